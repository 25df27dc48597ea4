"""The many-step sample from the same noise, as the measure of a sample that took few steps."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..grids import uniform_grid
from ..models.base import Conditioning, DiffusionModel
from ..rewards import Reward, RewardOutput
from ..rewards.base import Metadata
from ..transitions import ddim_transition

REFERENCE_DISTANCE = "reference_distance"
_CACHED_SAMPLES = 4096


class ReferenceDistance(Reward):
    """−mean squared error between an image in [0, 1] and the one that `num_steps` uniform steps make of its noise.

    Only an environment knows the noise, so it asks `distance`; as a reward of images alone it raises. References are
    remembered by noise and prompt: lanes and episodes that start from the same noise share one.

    Args:
        guidance_scale: With which references are sampled; None: the model's default.
        num_steps: Network calls of a reference.

    Raises:
        ValueError: `num_steps` is not positive.
    """

    name = REFERENCE_DISTANCE
    unit = "−MSE"
    range = (-1.0, 0.0)

    def __init__(self, *, guidance_scale: float | None = None, num_steps: int = 80) -> None:
        if num_steps < 1:
            raise ValueError(f"reference_steps must be at least 1, got {num_steps}")
        self.guidance_scale = guidance_scale
        self.num_steps = num_steps
        self._known: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()

    def __call__(  # noqa: D102
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        raise TypeError("reference_distance compares with a sample from the same noise: only an environment knows it")

    def distance(
        self,
        model: DiffusionModel,
        images: Tensor,
        *,
        latents: Tensor,
        conditioning: Conditioning,
        prompts: Sequence[str],
    ) -> RewardOutput:
        """Return the rewards [B] of images that the model made from the noise `latents` [B, C, H, W]."""
        keys = [
            (prompt, hashlib.blake2b(noise.float().cpu().numpy().tobytes(), digest_size=16).digest())
            for prompt, noise in zip(prompts, latents, strict=True)
        ]
        first = {key: row for row, key in enumerate(keys) if key not in self._known}
        if first:
            rows = torch.tensor(list(first.values()), device=latents.device)
            samples = self._sample(model, latents[rows], {name: value[rows] for name, value in conditioning.items()})
            self._known.update(zip(first, samples, strict=True))
        for key in keys:
            self._known.move_to_end(key)
        references = model.decode(torch.stack([self._known[key] for key in keys]))
        while len(self._known) > _CACHED_SAMPLES:
            self._known.popitem(last=False)
        return RewardOutput(-(images - references).square().flatten(1).mean(1))

    def _sample(self, model: DiffusionModel, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """Return x_0 [B, C, H, W] by deterministic steps on a uniform grid."""
        schedule = model.schedule
        scale = model.default_guidance_scale if self.guidance_scale is None else self.guidance_scale
        grid = uniform_grid(schedule, self.num_steps).float().to(latents.device)
        for t, s in pairwise(grid.expand(len(latents), -1).unbind(1)):
            prediction = model.denoise(latents, t, conditioning, guidance_scale=scale)
            step = ddim_transition(prediction.x0, prediction.epsilon, schedule=schedule, t=t, s=s, eta=0.0)
            latents = step.mean.to(latents.dtype)
        return latents
