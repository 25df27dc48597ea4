"""The families of models, each as a small folder of the real classes with random weights: a new one is a line here."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor

from tests.tiny import make_tiny_flux, make_tiny_stable_diffusion, make_tiny_stable_diffusion_3


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
        told_size: The first size, where the folder's own is too large for tests.
    """

    name: str
    write: Callable[[Path], Path]
    settings: Mapping[str, Any] = field(default_factory=dict)
    packed: Callable[[Tensor], Tensor] = lambda latents: latents
    guidance_scale: float = 4.0
    image_sizes: tuple[tuple[int, int], ...] = ((16, 16), (16, 24), (32, 16))
    told_size: tuple[int, int] | None = None

    def draw(self, folder: Path, prompts: list[str], latents: Tensor, *, num_steps: int, **more: Any) -> Tensor:
        """Return the images [B, 3, H, W] in [0, 1] that the folder's plain diffusers pipeline draws from noise."""
        pipeline = more.pop("pipeline", None) or open_pipeline(folder)
        height, width = more.pop("image_size")
        images = pipeline(
            prompt=prompts,
            latents=self.packed(latents),
            num_inference_steps=num_steps,
            guidance_scale=self.guidance_scale,
            height=height,
            width=width,
            output_type="pt",
            **{**self.settings, **more},
        ).images
        return images.float()


def open_pipeline(folder: Path) -> DiffusionPipeline:
    """Return a folder's plain pipeline, in float32."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, value in index.items() if value == [None, None]}  # diffusers wants it said again
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _packed(latents: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, batch, channels, height, width)


FAMILIES = (
    Family("stable-diffusion", partial(make_tiny_stable_diffusion, steps_offset=1)),
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
