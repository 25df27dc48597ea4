"""Latent consistency models (LCM): Stable Diffusion distilled into a few steps, by a UNet that is told the guidance."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from ..predictions import broadcast_to
from ..samplers import Consistency
from ..schedules import as_float
from ..transfer import to_device
from .base import Conditioning, ImageSize
from .schedulers import consistency_schedule
from .stable_diffusion import StableDiffusionModel
from .understood import LCM_UNET

_SIGMA_DATA = 0.5  # fixed in diffusers' LCMScheduler


def guidance_embedding(guidance_scale: float, size: int) -> Tensor:
    """Return what a UNet is told of the guidance scale, [size] float32, on the CPU: sines and cosines of 1000·(w − 1).

    Source: diffusers' `LatentConsistencyModelPipeline.get_guidance_scale_embedding`, in its order of operations: at
    angles of thousands another order shows.

    Args:
        guidance_scale: w as of classifier-free guidance: 1 is none.
        size: The length, at least 4.
    """
    half = size // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = torch.tensor(guidance_scale - 1) * 1000.0 * frequencies
    return F.pad(torch.cat([torch.sin(angles), torch.cos(angles)]), (0, size % 2))


class LatentConsistencyModel(StableDiffusionModel):
    """A `LatentConsistencyModelPipeline` folder, such as LCM_Dreamshaper_v7.

    Its prediction of x_0 is the consistency function f, with the noise that goes with it, (x_t − α_t·f)/σ_t:

        f = c_skip·x_t + c_out·x̂_0    c_skip = σ_d²/((κt)² + σ_d²)    c_out = κt/√((κt)² + σ_d²)

    with the x̂_0 of the UNet's output, σ_d = ½ and the folder's `timestep_scaling` κ (10); at t = 0 it is x_t. The
    default sampler draws all noise of the next time anew; the last action is f, a step without density.

    The UNet is told the guidance scale, so that a step is one pass, and there is no negative prompt.

    Source: Luo et al., 2023, "Latent Consistency Models", https://arxiv.org/abs/2310.04378.
    """

    components: ClassVar = {**StableDiffusionModel.components, "scheduler": ("LCMScheduler",)}
    guidance = "embedded"
    default_guidance_scale = 8.5
    default_sampler = Consistency()

    def _examine(self, image_size: ImageSize | None) -> None:
        unet = self._examine_networks(LCM_UNET, image_size)
        self._guidance_size = unet.config.time_cond_proj_dim
        self.schedule, self.prediction_type, self._timestep_scaling = consistency_schedule(self.path / "scheduler")

    @override
    def to_x0_and_epsilon(self, model_output: Tensor, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        pred_x0, _ = super().to_x0_and_epsilon(model_output, latents, t)
        scaled = self._timestep_scaling * as_float(t).clamp(min=0)
        c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + _SIGMA_DATA**2).sqrt()
        consistent = broadcast_to(c_skip, latents) * latents + broadcast_to(c_out, latents) * pred_x0
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        sigma = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)  # 0 at the clean end, where the noise is 0 too
        return consistent, (latents - broadcast_to(alpha, latents) * consistent) / broadcast_to(sigma, latents)

    @override
    def _model_output(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        dtype = next(network.parameters()).dtype
        told = to_device(guidance_embedding(guidance_scale, self._guidance_size), latents.device)
        return network(
            latents.to(dtype),
            t,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            timestep_cond=told.to(dtype).expand(len(latents), -1),
            return_dict=False,
        )[0]
