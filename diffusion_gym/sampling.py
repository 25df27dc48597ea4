"""Plain sampling, without environment or policy."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .models.base import Conditioning, DiffusionModel
from .predictions import broadcast_to
from .samplers import DDIM, Sampler
from .transitions import transition


@torch.no_grad()
def sample_latents(
    model: DiffusionModel,
    noise: Tensor,
    conditioning: Conditioning,
    times: Tensor,
    *,
    sampler: Sampler = DDIM(0.0),
    generators: torch.Generator | Sequence[torch.Generator] | None = None,
    correct: Callable[[Tensor], Tensor] | None = None,
    guidance_scale: float | None = None,
    denoiser: nn.Module | None = None,
) -> Tensor:
    """Return the x_0 of x_T, [B, C, H, W]; one network call per step and sample.

    By default by DDIM with η = 0 (Euler on a flow). With `Consistency()` and a consistency model it is algorithm 1 of
    "Consistency Models".

    Source: Song et al., 2020, https://arxiv.org/abs/2010.02502; Song et al., 2023, https://arxiv.org/abs/2303.01469.

    Args:
        model: The diffusion model.
        noise: [B, C, H, W] x_T, or any x_t of the first time.
        conditioning: What `model.encode_prompts` returns, [B, ...] each.
        times: [num_steps + 1] falling, such as `model.schedule.timesteps(20)` or one of `diffusion_gym.grids`.
        sampler: The sampler.
        generators: Where the noise of a stochastic sampler's steps is drawn from, see `transitions.draw_noise`.
        correct: What replaces each step's prediction x̂_0 [B, C, H, W]; ε̂ is then what x_t has beside it.
        guidance_scale: Classifier-free guidance, at least 0 (up to 1: none); None: the model's default.
        denoiser: The network to ask; None: the frozen one.

    Raises:
        ValueError: `guidance_scale` is not finite, or negative.
    """
    scale = model.guidance_scale_of(guidance_scale)
    schedule, latents = model.schedule, noise
    for t, s in pairwise(times.float().to(noise.device).expand(len(noise), -1).unbind(1)):
        prediction = model.denoise(latents, t, conditioning, guidance_scale=scale, denoiser=denoiser)
        pred_x0, pred_epsilon = prediction.x0, prediction.epsilon
        if correct is not None:
            pred_x0 = correct(pred_x0)
            alpha, sigma = (broadcast_to(level(t), latents) for level in (schedule.alpha, schedule.sigma))
            pred_epsilon = (latents - alpha * pred_x0) / sigma
        step = transition(pred_x0, pred_epsilon, sampler.scales(schedule, t, s))
        latents = step.sample(generators).to(noise.dtype)
    return latents
