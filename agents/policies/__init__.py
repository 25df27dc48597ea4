"""Policies: what is optimised."""

from pathlib import Path

import torch

from diffusion_gym.models.base import DiffusionModel

from .adaptation import Adaptation, Full, LoRA, Only
from .base import Distribution, Policy, saved_class
from .beta import BetaDistribution
from .denoising import DenoisingPolicy
from .schedules import ContextFreeSchedule, FixedSchedule
from .time_prediction import TimePredictor

__all__ = [
    "Adaptation",
    "BetaDistribution",
    "ContextFreeSchedule",
    "DenoisingPolicy",
    "Distribution",
    "FixedSchedule",
    "Full",
    "LoRA",
    "Only",
    "Policy",
    "TimePredictor",
    "load_policy",
]

_SAVED: dict[str, type[Policy]] = {
    policy.__name__: policy for policy in (DenoisingPolicy, TimePredictor, ContextFreeSchedule, FixedSchedule)
}


def load_policy(folder: Path | str, model: DiffusionModel | None = None, device: str | torch.device = "cpu") -> Policy:
    """Return the policy that a folder holds, of whatever class.

    Args:
        folder: What its `save` was given.
        model: The loaded diffusion model, for policies that are made from one; None: load it.
        device: Where to load it.

    Raises:
        FileNotFoundError: the folder is not a saved policy.
        ValueError: its class is not one of this package: load it with its own `load`.
    """
    name = saved_class(Path(folder))
    if name not in _SAVED:
        raise ValueError(
            f"{folder} holds a {name}, which is none of {sorted(_SAVED)}: use its own load, or give the run's load a "
            "policy to read into, policy=…"
        )
    return _SAVED[name].load(folder, model=model, device=device)
