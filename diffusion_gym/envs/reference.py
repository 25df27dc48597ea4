"""The distance of a sample that took few steps to the many-step sample from the same noise."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from typing_extensions import override

from .. import transfer
from ..checks import checked_integer
from ..grids import uniform_grid
from ..models.base import Conditioning, DiffusionModel, checked_guidance_scale
from ..rewards import Reward, RewardOutput
from ..rewards.base import Metadata
from ..rewards.names import REFERENCE_DISTANCE
from ..sampling import sample_latents

REFERENCE_STEPS = 80
_CACHED_SAMPLES = 4096

_Key = tuple[str, str, float, int, bytes]


class ReferenceDistance(Reward):
    """−mean squared error between an image in [0, 1] and the one that `num_steps` uniform steps make of its noise.

    Only an environment knows the noise, so it calls `distance`; a call as a reward of images alone raises. References
    are remembered by all that they depend on: lanes and episodes that start from the same noise share one.

    Args:
        guidance_scale: The guidance scale of references; None: the environment's.
        num_steps: Network calls of a reference.
        root: Take the negative root of that error, the distance itself. The squares of a few images that end up as
            another image outweigh those of all others; roots are easier to learn from.

    Raises:
        ValueError: `num_steps` is no positive integer, or `guidance_scale` no guidance scale.
    """

    name = REFERENCE_DISTANCE
    range = (-1.0, 0.0)

    def __init__(
        self, *, guidance_scale: float | None = None, num_steps: int = REFERENCE_STEPS, root: bool = False
    ) -> None:
        self.guidance_scale = None if guidance_scale is None else checked_guidance_scale(guidance_scale)
        self.num_steps = checked_integer("reference_steps", num_steps, at_least=1)
        self.root = root
        self.unit = "−RMSE" if root else "−MSE"
        self._forget()

    def _forget(self) -> None:
        self._samples: WeakKeyDictionary[DiffusionModel, OrderedDict[_Key, Tensor]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_samples"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        raise TypeError("reference_distance compares with a sample from the same noise: only an environment knows it")

    def distance(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
        *,
        model: DiffusionModel,
        noise: Tensor,
        conditioning: Conditioning,
        negative_prompt: str,
        guidance_scale: float,
    ) -> RewardOutput:
        """Return the rewards [B] of images that the model made from this noise.

        Args:
            images: [B, 3, H, W] in [0, 1].
            prompts: The prompt of each.
            metadata: Ignored.
            model: The model.
            noise: [B, C, H, W] x_T of each.
            conditioning: [B, ...] each, of the prompts.
            negative_prompt: The environment's.
            guidance_scale: The environment's, for a reward that has none of its own.

        Raises:
            ValueError: the model's weights are divided among processes, which remember different references.
        """
        if model.is_sharded:
            raise ValueError(
                f"{self.name} makes a reference for a new noise alone, and a denoiser whose weights are divided among "
                "processes needs the same passes in all: give another reward, or launch without --use_fsdp"
            )
        scale = guidance_scale if self.guidance_scale is None else self.guidance_scale
        samples_of = self._samples.setdefault(model, OrderedDict())
        keys = [
            (
                prompt,
                negative_prompt,
                scale,
                self.num_steps,
                hashlib.blake2b(row.tobytes(), digest_size=16).digest(),
            )
            for prompt, row in zip(prompts, transfer.to_host(noise.float()), strict=True)
        ]
        missing = {key: row for row, key in enumerate(keys) if key not in samples_of}
        if missing:
            rows = torch.tensor(list(missing.values()), device=noise.device)
            missing_conditioning = {name: value[rows] for name, value in conditioning.items()}
            grid = uniform_grid(model.schedule, self.num_steps)
            samples = sample_latents(model, noise[rows], missing_conditioning, grid, guidance_scale=scale)
            samples_of.update(zip(missing, samples, strict=True))
        for key in keys:
            samples_of.move_to_end(key)
        references = model.decode(torch.stack([samples_of[key] for key in keys]))
        while len(samples_of) > _CACHED_SAMPLES:
            samples_of.popitem(last=False)
        error = (images - references).square().flatten(1).mean(1)
        return RewardOutput(-(error.sqrt() if self.root else error))
