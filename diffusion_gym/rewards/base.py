"""The reward's contract, callables, and the one conversion of images to bytes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

Metadata = Mapping[str, object]
RewardFunction = Callable[[Tensor, Sequence[str], Sequence[Metadata]], Tensor]


@dataclass(frozen=True)
class RewardOutput:
    """What a reward says of a batch.

    Args:
        values: [B] float32, on the images' device.
        extras: Further numbers [B] to report beside it, by name.
    """

    values: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class Reward(ABC):
    """A function of images and prompts.

    Attributes:
        name: What it is called in logs and in `info["reward/<name>"]`.
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
            metadata: What the prompt set says of each prompt.

        Returns:
            A `RewardOutput`, never a bare tensor: `RewardOutput(values)`.
        """

    def state_dict(self) -> dict[str, object]:
        """Return what the reward remembers of what it saw, as JSON can hold it; most remember nothing: {}."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            ValueError: it is another reward's.
        """
        if state:
            raise ValueError(f"the reward {self.name!r} remembers nothing, but the state of one that does was given")


def to_uint8(images: Tensor) -> Tensor:
    """Return images [B, 3, H, W] in [0, 1] as bytes [B, H, W, 3] on the CPU, rounded to the nearest level.

    Source: ddpo-pytorch rewards.py (`(images * 255).round().clamp(0, 255)`); jannerm/ddpo truncates instead.
    """
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def check_prompts(images: Tensor, prompts: Sequence[str]) -> None:
    """Do nothing where there is a prompt per image.

    Raises:
        ValueError: there is not.
    """
    if len(prompts) != len(images):
        raise ValueError(f"there must be a prompt per image, got {len(images)} images and {len(prompts)} prompts")


def _check_values(what: str, values: object, num_images: int) -> None:
    """Do nothing where `values` are one real number per image.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(values, Tensor) or values.is_complex() or values.shape != (num_images,):
        got = f"{list(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else f"{values!r:.80}"
        raise ValueError(f"{what} must be one value per image, [{num_images}] real numbers, got {got}")


def checked_output(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
) -> RewardOutput:
    """Return what a reward says of a batch, once it is what a reward is to say.

    Raises:
        ValueError: it is no `RewardOutput`, or its numbers are not one per image.
    """
    output = reward(images, prompts, metadata)
    if not isinstance(output, RewardOutput):
        raise ValueError(f"the reward {reward.name!r} must return a RewardOutput(values), got {output!r:.80}")
    _check_values(f"the values of the reward {reward.name!r}", output.values, len(images))
    for name, values in output.extras.items():
        _check_values(f"the extra {name!r} of the reward {reward.name!r}", values, len(images))
    return output


class CallableReward(Reward):
    """A user's function `f(images, prompts, metadata) -> [B]` as a reward.

    Raises:
        ValueError: when called, if the function's output is not one real number per image.
    """

    def __init__(self, function: RewardFunction, name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))

    def __call__(  # noqa: D102
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        values: object = self.function(images, prompts, metadata or [{} for _ in prompts])
        with suppress(TypeError, ValueError, RuntimeError):  # what is no tensor then is refused
            values = torch.as_tensor(values)
        _check_values(f"what the reward {self.name!r} returns", values, len(images))
        return RewardOutput(torch.as_tensor(values, dtype=torch.float32, device=images.device))
