"""The options of environments: their types, checks and conversions."""

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from inspect import Parameter, Signature, signature
from typing import Literal, TypedDict

import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

from ..models.base import DiffusionModel, ImageSize, as_image_size, to_device, to_dtype
from ..models.loading import load_model
from ..prompts import PromptSet
from ..rewards import Reward

ModelSource = str | os.PathLike[str] | DiffusionModel
PromptSource = str | os.PathLike[str] | Sequence[str] | Mapping[str, float] | PromptSet | None
InvalidReward = Literal["raise", "nan"]
RewardSource = str | Reward | Mapping[str, float]


def to_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """Return Gymnasium's autoreset mode, given by its value ("SameStep"), by its name ("SAME_STEP") or as itself.

    Raises:
        ValueError: there is no such mode.
    """
    for member in AutoresetMode:
        if mode in (member, member.value, member.name):
            return member
    raise ValueError(f"autoreset_mode must be one of {[member.name for member in AutoresetMode]}, got {mode!r}")


def resolve_model(
    model: ModelSource,
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    image_size: ImageSize | None,
    variant: str | None,
    without: Sequence[str] | None,
    offload: bool | None,
    text_encoder_dtype: str | torch.dtype | None,
) -> DiffusionModel:
    """Return the loaded model; one that is loaded already is checked against the other arguments.

    Raises:
        ValueError: it does not fit them.
    """
    if not isinstance(model, DiffusionModel):
        return load_model(
            model,
            device=device or "cpu",
            dtype=dtype or "float32",
            image_size=image_size,
            variant=variant,
            without=without or (),
            offload=False if offload is None else offload,
            text_encoder_dtype=text_encoder_dtype or "float32",
        )
    precision = None if text_encoder_dtype is None else to_dtype(text_encoder_dtype, "text_encoder_dtype")
    requests = {
        "device": (None if device is None else to_device(device), model.device),
        "dtype": (None if dtype is None else to_dtype(dtype), model.dtype),
        "image_size": (None if image_size is None else as_image_size(image_size), model.image_size),
        "variant": (variant, model.variant),
        "without": (None if without is None else tuple(without), model.without),
        "offload": (offload, model.offload),
        "text_encoder_dtype": (precision, model.text_encoder_dtype),
    }
    for name, (requested, loaded) in requests.items():
        if requested is not None and requested != loaded:
            raise ValueError(
                f"{name}={requested} differs from the loaded model's {loaded}: leave it out, or load_model anew"
            )
    return model


def signature_of(environment: type, *, without: Collection[str] = ()) -> Signature:
    """Return the signature of an environment's class, with the keywords of its bases and their defaults.

    Args:
        environment: The class, whose constructor passes on to its base what it does not take itself.
        without: Parameters to leave out.
    """
    parameters: dict[str, Parameter] = {}
    for constructor in (vars(cls)["__init__"] for cls in environment.__mro__ if "__init__" in vars(cls)):
        for parameter in list(signature(constructor).parameters.values())[1:]:
            if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                parameters.setdefault(parameter.name, parameter)
    return Signature([parameter for name, parameter in parameters.items() if name not in without])


def as_json_can_hold(spec: EnvSpec | None) -> EnvSpec | None:
    """Return a spec whose keywords JSON can hold where they stand for names or numbers: `spec.to_json()` works then."""
    if spec is None:
        return None
    plain: dict[str, object] = {}
    for name, value in spec.kwargs.items():
        if isinstance(value, AutoresetMode):
            plain[name] = value.name
        elif isinstance(value, torch.device | torch.dtype):
            plain[name] = str(value).removeprefix("torch.")
        elif isinstance(value, np.generic):
            plain[name] = value.item()
        else:
            plain[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
    spec = copy.copy(spec)
    spec.kwargs = plain
    return spec


class HasSpec:
    """An environment whose spec, Gymnasium's account of how it was made, can be written as JSON."""

    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """Gymnasium's record of the call that made it; None if it was made otherwise."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = as_json_can_hold(spec)


def refuse_vector_options(options: Mapping[str, object]) -> None:
    """Check that a single environment was given no option that only vector environments take.

    Raises:
        TypeError: it was given one.
    """
    for name in {"num_envs", "autoreset_mode"} & options.keys():
        raise TypeError(f"{name} is an argument of gym.make_vec: an environment of gym.make is one lane, reset by hand")


class EnvOptions(TypedDict, total=False):
    """The keywords that every environment takes, single or vector; see `DenoisingEnv`."""

    model: ModelSource
    reward: RewardSource
    prompts: PromptSource
    device: str | torch.device | None
    dtype: str | torch.dtype | None
    image_size: ImageSize | None
    variant: str | None
    without: Sequence[str] | None
    offload: bool | None
    text_encoder_dtype: str | torch.dtype | None
    negative_prompt: str
    observe_embeds: bool | None
    render_mode: str | None
    on_invalid_reward: InvalidReward


class VectorEnvOptions(EnvOptions, total=False):
    """The keywords that every vector environment takes."""

    autoreset_mode: AutoresetMode | str
