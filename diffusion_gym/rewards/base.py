"""The reward's contract, callables, and the one conversion of images to bytes."""

import datetime
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Real

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from .. import transfer

Metadata = Mapping[str, object]
RewardFunction = Callable[[Tensor, Sequence[str], Sequence[Metadata]], Tensor]


@dataclass(frozen=True)
class RewardOutput:
    """A reward's values for a batch.

    Args:
        values: [B] float32, on the images' device.
        extras: Further numbers [B] to report beside them, by name.
    """

    values: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class Reward(ABC):
    """A function of images and prompts.

    Attributes:
        name: Its name in logs and in `info["reward/<name>"]`.
        unit: The unit of its values.
        range: The least and the greatest value it can take.
    """

    name: str
    unit: str = "1"
    range: tuple[float, float] = (-float("inf"), float("inf"))

    @abstractmethod
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        """Return the rewards of a batch.

        Args:
            images: [B, 3, H, W], RGB in [0, 1].
            prompts: The B prompts that they were drawn for.
            metadata: The prompt set's metadata of each prompt.

        Returns:
            A `RewardOutput`, never a bare tensor: `RewardOutput(values)`.
        """

    def make_ready(self) -> None:
        """Get ready for the first call, or raise an error that names what is missing; `make_reward` calls it.

        Nothing large is read: weights are fetched where they are not there yet, and a server is asked whether it runs.
        Most rewards need nothing.

        Raises:
            ValueError, RuntimeError: something cannot be had.
        """

    def state_dict(self) -> dict[str, object]:
        """Return the reward's memory of earlier batches, as JSON can hold it; most remember nothing: {}."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            ValueError: it is another reward's.
        """
        if state:
            raise ValueError(f"the reward {self.name!r} remembers nothing, but the state of one that does was given")


def check_reward(reward: Reward) -> None:
    """Check a reward's name, unit and range.

    Raises:
        TypeError: one is not as `Reward` wants it; the message says which attribute is wrong.
    """
    kind = type(reward).__name__
    for attribute in ("name", "unit"):
        value = getattr(reward, attribute, None)
        if not isinstance(value, str) or not value:
            cure = f'name = "{kind.lower()}" in the class' if attribute == "name" else 'unit = "1" in the class'
            raise TypeError(
                f"the reward {kind} must have a {attribute}, a text that is not empty, got {value!r}: {cure}"
            )
    bounds: object = reward.range
    are_two = isinstance(bounds, tuple | list) and len(bounds) == 2 and all(isinstance(bound, Real) for bound in bounds)
    if not are_two or not reward.range[0] <= reward.range[1]:
        raise TypeError(f"the range of the reward {reward.name!r} must be (least, greatest), got {bounds!r}")


def check_finite(images: Tensor) -> None:
    """Check that images [B, ...] are finite: one with NaN or infinity is no picture, and is never rewarded.

    Raises:
        ValueError: one is not.
    """
    finite = transfer.to_host(torch.isfinite(images).flatten(1).all(1))
    if not finite.all():
        raise ValueError(
            f"the images {np.flatnonzero(~finite).tolist()} of {len(images)} are NaN or infinite: there is no "
            "picture to show or to reward"
        )


def to_uint8(images: Tensor) -> Tensor:
    """Return images [B, 3, H, W] in [0, 1] as bytes [B, H, W, 3] on the CPU, rounded to the nearest level.

    Source: ddpo-pytorch rewards.py (`(images * 255).round().clamp(0, 255)`); jannerm/ddpo truncates instead.

    Raises:
        ValueError: one of them is NaN or infinite.
    """
    check_finite(images)
    levels = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return torch.from_numpy(transfer.to_host(levels.permute(0, 2, 3, 1)))


def as_json(value: object) -> object:
    """Return a value of metadata in a form that JSON can hold: NumPy's numbers and arrays, and dates.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(
        f"the metadata of prompts must be what JSON can hold, got {type(value).__name__}, {value!r:.80}: leave it out "
        "of the prompt set, or compute the reward in this process"
    )


def check_prompts(images: Tensor, prompts: Sequence[str]) -> None:
    """Check that there is a prompt per image.

    Raises:
        ValueError: there is not.
    """
    if len(prompts) != len(images):
        raise ValueError(f"there must be a prompt per image, got {len(images)} images and {len(prompts)} prompts")


def _check_values(what: str, values: object, num_images: int) -> None:
    """Check that `values` are one real number per image.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(values, Tensor) or values.is_complex() or values.shape != (num_images,):
        got = f"{list(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else f"{values!r:.80}"
        raise ValueError(f"{what} must be one value per image, [{num_images}] real numbers, got {got}")


def check_output(reward: Reward, output: object, images: Tensor) -> RewardOutput:
    """Return a reward's output for images, after a check of its type, shapes and device.

    Raises:
        ValueError: it is no `RewardOutput`, its numbers are not one per image, or they are on another device.
    """
    if not isinstance(output, RewardOutput):
        raise ValueError(f"the reward {reward.name!r} must return a RewardOutput(values), got {output!r:.80}")
    named = {f"the extra {name!r} of the reward {reward.name!r}": values for name, values in output.extras.items()}
    for what, values in {f"the values of the reward {reward.name!r}": output.values, **named}.items():
        _check_values(what, values, len(images))
        if values.device != images.device:
            raise ValueError(
                f"{what} must be on the images' device, {images.device}; got {values.device}: "
                "return values.to(images.device)"
            )
    return output


def checked_output(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
) -> RewardOutput:
    """Return the output of a reward that is called with a batch, after `check_output`.

    Raises:
        ValueError: see `check_output`.
    """
    return check_output(reward, reward(images, prompts, metadata), images)


class CallableReward(Reward):
    """A user's function `f(images, prompts, metadata) -> [B]` as a reward.

    Args:
        function: The function.
        name: The reward's name; None: the function's.

    Raises:
        TypeError: the function does not take these three.
        ValueError: when called, if the function's output is not one real number per image.
    """

    def __init__(self, function: RewardFunction, name: str | None = None) -> None:
        with suppress(ValueError):  # a function that is not written in Python may have no signature
            signature = inspect.signature(function)
            try:
                signature.bind((), (), ())
            except TypeError as error:
                raise TypeError(
                    f"a reward function takes (images, prompts, metadata), but {function!r} takes {signature}: {error}"
                ) from None
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        values: object = self.function(images, prompts, metadata or [{} for _ in prompts])
        with suppress(TypeError, ValueError, RuntimeError):  # values that make no tensor are refused below
            values = torch.as_tensor(values)
        _check_values(f"what the reward {self.name!r} returns", values, len(images))
        return RewardOutput(torch.as_tensor(values, dtype=torch.float32, device=images.device))
