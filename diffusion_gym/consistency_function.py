"""The consistency function: every x_t of a trajectory of the probability-flow ODE is mapped to the trajectory's end.

    f(x, t) = c_skip·x + c_out·F(x, t)    with c_skip = 1 and c_out = 0 at the boundary, where f(x, t) = x

Source: Song et al., 2023, "Consistency Models", https://arxiv.org/abs/2303.01469.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .predictions import broadcast_to
from .schedules import as_float


def ve_scalings(sigma: Tensor, *, sigma_data: float = 0.5, sigma_min: float = 0.002) -> tuple[Tensor, Tensor, Tensor]:
    """Return c_skip, c_out and c_in of a variance-exploding process, each shaped like `sigma`.

        c_skip = σ_d²/((σ − ε)² + σ_d²)    c_out = σ_d·(σ − ε)/√(σ² + σ_d²)    c_in = 1/√(σ² + σ_d²)

    Source: Song et al., 2023, appendix C.

    Args:
        sigma: The noise levels σ, at least ε.
        sigma_data: σ_d, the standard deviation of the data.
        sigma_min: ε, the boundary.
    """
    sigma = as_float(sigma)
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    away = sigma - torch.tensor(sigma_min, dtype=sigma.dtype)  # 0, and not a rounding error, at the boundary
    return sigma_data**2 / (away**2 + sigma_data**2), sigma_data * away * c_in, c_in


def latent_scalings(t: Tensor, *, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return c_skip and c_out of a latent consistency model, each shaped like `t`; the boundary is at index 0.

        c_skip = σ_d²/((κt)² + σ_d²)    c_out = κt/√((κt)² + σ_d²)

    Source: Luo et al., 2023, "Latent Consistency Models", https://arxiv.org/abs/2310.04378; diffusers' `LCMScheduler`.

    Args:
        t: The indices; those below 0 count as 0.
        timestep_scaling: κ.
        sigma_data: σ_d.
    """
    scaled = timestep_scaling * as_float(t).clamp(min=0)
    return sigma_data**2 / (scaled**2 + sigma_data**2), scaled / (scaled**2 + sigma_data**2).sqrt()


@torch.no_grad()
def exact_consistency(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigma: Tensor,
    *,
    sigma_min: float = 0.002,
    num_steps: int = 400,
) -> Tensor:
    """Return f(x, σ) of an exact denoiser, [B, ...] float64: the ODE is integrated numerically.

        dx/du = x − D(x, e^u),  u = ln σ,  from ln σ to ln ε,  by Runge and Kutta's steps of order 4

    A variance-preserving x_t is the variance-exploding x_t/α_t at σ = σ_t/α_t: one function serves both.

    Args:
        denoise: D, the exact E[x_0|x] of x [B, ...] and σ [B], in float64.
        x: [B, ...] the points.
        sigma: [B] their noise levels, positive.
        sigma_min: ε, where trajectories end.
        num_steps: Steps of each trajectory, equally long in u. With 400 the error is below 1e-6 on the mixture; it
            falls with the fourth power.
    """
    x, u = x.double(), sigma.double().log()
    step = (math.log(sigma_min) - u) / num_steps
    h = broadcast_to(step, x)
    for _ in range(num_steps):
        first = x - denoise(x, u.exp())
        second_x = x + h / 2 * first
        second = second_x - denoise(second_x, (u + step / 2).exp())
        third_x = x + h / 2 * second
        third = third_x - denoise(third_x, (u + step / 2).exp())
        fourth_x = x + h * third
        fourth = fourth_x - denoise(fourth_x, (u + step).exp())
        x, u = x + h / 6 * (first + 2 * second + 2 * third + fourth), u + step
    return x
