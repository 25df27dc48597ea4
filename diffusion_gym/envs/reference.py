"""The many-step sample from the same noise, as the measure of a sample that took few steps."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..grids import uniform_grid
from ..models.base import Conditioning, DiffusionModel
from ..rewards import Reward, RewardOutput
from ..rewards.base import Metadata
from ..rewards.names import REFERENCE_DISTANCE
from ..sampling import sample_latents

_CACHED_SAMPLES = 4096


class ReferenceDistance(Reward):
    """−mean squared error between an image in [0, 1] and the one that `num_steps` uniform steps make of its noise.

    Only an environment knows the noise, so it asks `distance`; as a reward of images alone it raises. References are
    remembered by noise and prompt: lanes and episodes that start from the same noise share one.

    Args:
        guidance_scale: With which references are sampled; None: the model's default.
        num_steps: Network calls of a reference.
        root: −the root of that error instead, the distance itself. The squares of a few images that end up as another
            image outweigh those of all others; roots are easier to learn from.

    Raises:
        ValueError: `num_steps` is not positive.
    """

    name = REFERENCE_DISTANCE
    range = (-1.0, 0.0)

    def __init__(self, *, guidance_scale: float | None = None, num_steps: int = 80, root: bool = False) -> None:
        if num_steps < 1:
            raise ValueError(f"reference_steps must be at least 1, got {num_steps}")
        self.guidance_scale = guidance_scale
        self.num_steps = num_steps
        self.root = root
        self.unit = "−RMSE" if root else "−MSE"
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
            chosen = {name: value[rows] for name, value in conditioning.items()}
            grid = uniform_grid(model.schedule, self.num_steps)
            samples = sample_latents(model, latents[rows], chosen, grid, guidance_scale=self.guidance_scale)
            self._known.update(zip(first, samples, strict=True))
        for key in keys:
            self._known.move_to_end(key)
        references = model.decode(torch.stack([self._known[key] for key in keys]))
        while len(self._known) > _CACHED_SAMPLES:
            self._known.popitem(last=False)
        error = (images - references).square().flatten(1).mean(1)
        return RewardOutput(-(error.sqrt() if self.root else error))
