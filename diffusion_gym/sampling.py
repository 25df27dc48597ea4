"""Plain sampling by deterministic steps, without environment or policy."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from .models.base import Conditioning, DiffusionModel
from .samplers import DDIM
from .transitions import transition


@torch.no_grad()
def sample_latents(
    model: DiffusionModel,
    noise: Tensor,
    conditioning: Conditioning,
    times: Tensor,
    *,
    guidance_scale: float | None = None,
    denoiser: nn.Module | None = None,
) -> Tensor:
    """Return the x_0 of x_T, [B, C, H, W], by DDIM with η = 0 (Euler on a flow); one network call per step and sample.

    Source: Song et al., 2020, https://arxiv.org/abs/2010.02502.

    Args:
        model: The diffusion model.
        noise: [B, C, H, W] x_T.
        conditioning: What `model.encode_prompts` returns, [B, ...] each.
        times: [num_steps + 1] falling, such as `model.schedule.timesteps(20)` or one of `diffusion_gym.grids`.
        guidance_scale: Classifier-free guidance, at least 0 (up to 1: none); None: the model's default.
        denoiser: The network to ask; None: the frozen one.

    Raises:
        ValueError: `guidance_scale` is not finite, or negative.
    """
    scale = model.guidance_scale_of(guidance_scale)
    latents = noise
    for t, s in pairwise(times.float().to(noise.device).expand(len(noise), -1).unbind(1)):
        prediction = model.denoise(latents, t, conditioning, guidance_scale=scale, denoiser=denoiser)
        step = transition(prediction.x0, prediction.epsilon, DDIM(0.0).scales(model.schedule, t, s))
        latents = step.mean.to(noise.dtype)
    return latents
