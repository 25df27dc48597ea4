"""The rewards of the task on the plane: how far to the right a sample lies, and whether it could be one of the data."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from diffusion_gym.models.loading import load_model
from diffusion_gym.models.mixture import MixtureModel


@cache
def _mixture() -> MixtureModel:
    model = load_model("mixture")
    assert isinstance(model, MixtureModel)
    return model


def rightness(images: Tensor, prompts: Sequence[str], metadata: object) -> Tensor:
    """Return the first coordinate of each sample, [B]."""
    return _mixture().positions(images)[:, 0]


def plausibility(images: Tensor, prompts: Sequence[str], metadata: object) -> Tensor:
    """Return each sample's log-density under the prompt's mixture, [B] in nats, at least -20."""
    model = _mixture()
    x = model.positions(images)[:, :, None, None]
    time = torch.full((len(x),), float(model.schedule.clean))
    return model.log_prob(x, time, model.encode_prompts(list(prompts))).clamp(min=-20)
