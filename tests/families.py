"""The families of models, each as a small folder of the real classes with random weights: a new one is a line here."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor, nn

from diffusion_gym.models import DiffusionModel
from diffusion_gym.samplers import DDIM, Consistency, Sampler
from diffusion_gym.transitions import transition
from tests.tiny import (
    make_tiny_flux,
    make_tiny_latent_consistency,
    make_tiny_stable_diffusion,
    make_tiny_stable_diffusion_3,
    make_tiny_stable_diffusion_xl,
)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        name: For the tests' names.
        write: Writes a small folder and returns it.
        settings: Further arguments of the pipeline's call.
        packed: Latents as the pipeline's call takes them.
        guidance_scale: One that has an effect, where there is any.
        image_sizes: Sizes to draw at, not square too; the first is the folder's own, unless it is told.
        sampler: The steps of the pipeline's scheduler.
        told_size: The first size, where the folder's own is too large for tests.
    """

    name: str
    write: Callable[[Path], Path]
    settings: Mapping[str, Any] = field(default_factory=dict)
    packed: Callable[[Tensor], Tensor] = lambda latents: latents
    guidance_scale: float = 4.0
    image_sizes: tuple[tuple[int, int], ...] = ((16, 16), (16, 24), (32, 16))
    sampler: Sampler = DDIM(0.0)
    told_size: tuple[int, int] | None = None

    @torch.no_grad()
    def sample(
        self,
        model: DiffusionModel,
        prompts: list[str],
        noise: Tensor,
        *,
        num_steps: int,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """Return the images [B, 3, H, W] in [0, 1] that this package draws from noise; its steps' noise is seeded."""
        conditioning, generators = model.encode_prompts(prompts), _generators(len(prompts))
        latents = model.schedule.initial_std * noise
        for times in pairwise(model.schedule.timesteps(num_steps).float()):
            t, s = (time.expand(len(latents)) for time in times)
            scale = self.guidance_scale
            prediction = model.denoise(latents, t, conditioning, guidance_scale=scale, denoiser=denoiser)
            scales = self.sampler.scales(model.schedule, t, s)
            latents = transition(prediction.x0, prediction.epsilon, scales).sample(generators)
        return model.decode(latents)

    def draw(self, folder: Path, prompts: list[str], latents: Tensor, *, num_steps: int, **more: Any) -> Tensor:
        """Return the images [B, 3, H, W] in [0, 1] that the plain pipeline draws, with the steps' noise of `sample`."""
        pipeline = more.pop("pipeline", None) or open_pipeline(folder)
        height, width = more.pop("image_size")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # diffusers' own, of NumPy
            images = pipeline(
                prompt=prompts,
                latents=self.packed(latents),
                generator=_generators(len(prompts)),
                num_inference_steps=num_steps,
                guidance_scale=self.guidance_scale,
                height=height,
                width=width,
                output_type="pt",
                **{**self.settings, **more},
            ).images
        return images.float()


def _generators(number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


def open_pipeline(folder: Path, **arguments: Any) -> DiffusionPipeline:
    """Return a folder's plain pipeline, in float32; `arguments` are further ones of `from_pretrained`."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, value in index.items() if value == [None, None]}  # diffusers wants it said again
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent, **arguments).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _packed(latents: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, batch, channels, height, width)


FAMILIES = (
    Family("stable-diffusion", partial(make_tiny_stable_diffusion, steps_offset=1)),
    Family("stable-diffusion-xl", make_tiny_stable_diffusion_xl),
    Family("latent-consistency", make_tiny_latent_consistency, sampler=Consistency()),
    Family("stable-diffusion-3", make_tiny_stable_diffusion_3),
    Family(
        "stable-diffusion-3-without-t5",
        partial(make_tiny_stable_diffusion_3, with_t5=False, use_dynamic_shifting=True),
        {"max_sequence_length": 0},
    ),
    Family("flux-dev", make_tiny_flux, packed=_packed, told_size=(16, 16)),
    Family(
        "flux-schnell",
        partial(make_tiny_flux, is_schnell=True),
        packed=_packed,
        guidance_scale=0.0,
        told_size=(16, 16),
    ),
)
