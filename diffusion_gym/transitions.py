"""One step of denoising as a Gaussian: every sampler is one family that differs in its standard deviation alone.

A step from t to a cleaner s is

    x_s | x_t  ~  N( α_s·x̂_0 + √(σ_s² − std²)·ε̂ ,  std² )        0 ≤ std ≤ σ_s

Each sample of a batch has its own t and s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .predictions import broadcast_to
from .schedules import NoiseSchedule
from .transfer import to_device

Reduction = Literal["sum", "mean"]


def reduce_dimensions(values: Tensor, reduction: Reduction) -> Tensor:
    """Return the sum or the mean of `values` [B, ...] over everything but the batch: [B]."""
    if reduction == "sum":
        return values.flatten(1).sum(1)
    if reduction == "mean":
        return values.flatten(1).mean(1)
    raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}')


def draw_noise(like: Tensor, generators: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Return standard normal noise shaped like `like` [B, ...], on its device, in its dtype.

    Args:
        like: The tensor whose shape, device and dtype are wanted.
        generators: One generator for the batch, or one per sample: then a sample's noise does not depend on the rest
            of the batch. The noise is drawn on the generator's own device and moved. None: torch's global generator.

    Raises:
        ValueError: there are several generators, but not one per sample.
    """
    if generators is None or isinstance(generators, torch.Generator):
        device = like.device if generators is None else generators.device
        noise = torch.randn(like.shape, generator=generators, device=device, dtype=like.dtype)
        return to_device(noise, like.device)
    if len(generators) != len(like):
        raise ValueError(f"generators must be one per sample: got {len(generators)} for a batch of {len(like)}")
    rows = [torch.randn(like.shape[1:], generator=g, device=g.device, dtype=like.dtype) for g in generators]
    return to_device(torch.stack(rows), like.device)


@dataclass(frozen=True, eq=False)
class GaussianTransition:
    """The distribution of x_s given x_t: independent Gaussians of one standard deviation per sample.

    Args:
        mean: [B, ...] float32 or float64.
        std: [B] ≥ 0. A sample whose std is 0 moves to its mean.
        deterministic: The whole batch is known, without looking at `std`, to have std 0.
    """

    mean: Tensor
    std: Tensor
    deterministic: bool = False

    @property
    def mode(self) -> Tensor:
        """The most probable x_s, [B, ...]: the mean."""
        return self.mean

    def sample(self, generators: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Return a draw of x_s, [B, ...]: mean + std·z with z from `generators` (see `draw_noise`)."""
        if self.deterministic:
            return self.mean
        return self.mean + broadcast_to(self.std, self.mean) * draw_noise(self.mean, generators)

    def log_prob(self, value: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Return log p(x_s = value | x_t), [B]: Σ_d −(value − mean)²/(2·std²) − log std − ½·log 2π.

        Args:
            value: [B, ...] the x_s to score.
            reduction: "sum" is the log-density; "mean" divides it by the number of dimensions, as the published DDPO
                codes do.

        Note:
            A sample with std 0 inside a batch that is otherwise stochastic (the step to the clean end) scores 0: the
            logarithm of its density with respect to the point mass that it is. Its gradient is 0 too.

        Raises:
            ValueError: the transition is deterministic, so it has no density.
        """
        if self.deterministic:
            raise ValueError("a deterministic transition (eta = 0) has no density to score: sample it with eta > 0")
        stochastic = broadcast_to(self.std > 0, self.mean)
        std = torch.where(stochastic, broadcast_to(self.std, self.mean), 1.0)
        standardised = (value.to(self.mean.dtype) - self.mean) / std
        log_density = -(standardised**2) / 2 - std.log() - math.log(2 * math.pi) / 2
        return reduce_dimensions(torch.where(stochastic, log_density, 0.0), reduction)

    def kl(self, other: "GaussianTransition", reduction: Reduction = "sum") -> Tensor:
        """Return KL(self ‖ other), [B]: Σ_d log(std₂/std₁) + (std₁² + (mean₁ − mean₂)²)/(2·std₂²) − ½.

        Note:
            A sample whose std is 0 on both sides (the step to the clean end) has the divergence 0, as its log-density
            is 0 in `log_prob`, and no gradient.

        Raises:
            ValueError: either transition is deterministic.
        """
        if self.deterministic or other.deterministic:
            raise ValueError("the KL divergence of a deterministic transition (eta = 0) is not defined: use eta > 0")
        stochastic = broadcast_to((self.std > 0) | (other.std > 0), self.mean)
        std, other_std = (torch.where(stochastic, broadcast_to(one.std, self.mean), 1.0) for one in (self, other))
        divergence = torch.log(other_std / std) + (std**2 + (self.mean - other.mean) ** 2) / (2 * other_std**2) - 0.5
        return reduce_dimensions(torch.where(stochastic, divergence, 0.0), reduction)


def ddim_scales(
    schedule: NoiseSchedule, t: Tensor, s: Tensor, *, eta: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what multiplies x̂_0, ε̂ and fresh noise in DDIM's step from t to s: [B] each (see `ddim_transition`)."""
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    q = alpha_t * sigma_s / (alpha_s * sigma_t)
    std = eta * sigma_s * torch.sqrt((1 - q**2).clamp(min=0))
    return alpha_s, sigma_s * torch.sqrt(1 - eta**2 + eta**2 * q**2), std


def ddim_transition(
    pred_x0: Tensor, pred_epsilon: Tensor, *, schedule: NoiseSchedule, t: Tensor, s: Tensor, eta: float | Tensor = 1.0
) -> GaussianTransition:
    """Return DDIM's step from t to s; for VP, flow and VE alike.

    std = η·σ_s·√(1 − q²),  mean = α_s·x̂_0 + σ_s·√(1 − η² + η²q²)·ε̂,  with q = α_t·σ_s / (α_s·σ_t).

    η = 0 is the deterministic step (DDIM; Euler on a flow), η = 1 is DDPM's ancestral sampling.

    Source: Song et al., 2020, eq. 12 and 16, https://arxiv.org/abs/2010.02502.

    Args:
        pred_x0: [B, ...] x̂_0 at t, float32 or float64.
        pred_epsilon: [B, ...] ε̂ at t.
        schedule: The process that t and s belong to.
        t: [B] the current time.
        s: [B] the next, cleaner time.
        eta: The share of DDPM's noise, in [0, 1]; or [B] each sample's (which is not looked at).

    Raises:
        ValueError: `eta` is outside [0, 1].
    """
    if not isinstance(eta, Tensor) and not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    alpha_s, epsilon_scale, std = ddim_scales(schedule, t, s, eta=eta)
    mean = broadcast_to(alpha_s, pred_x0) * pred_x0 + broadcast_to(epsilon_scale, pred_x0) * pred_epsilon
    return GaussianTransition(mean, std, deterministic=not isinstance(eta, Tensor) and eta == 0)


def consistency_transition(pred_x0: Tensor, *, schedule: NoiseSchedule, s: Tensor) -> GaussianTransition:
    """Return the multistep consistency (LCM) step: all noise is drawn anew, std = σ_s, mean = α_s·x̂_0.

    Source: Song et al., 2023, algorithm 1, https://arxiv.org/abs/2303.01469; Luo et al., 2023 (LCM),
    https://arxiv.org/abs/2310.04378.

    Args:
        pred_x0: [B, ...] the consistency function's output at t.
        schedule: The process that s belongs to.
        s: [B] the next time.
    """
    return GaussianTransition(broadcast_to(schedule.alpha(s), pred_x0) * pred_x0, schedule.sigma(s))


def cps_transition(
    pred_x0: Tensor, pred_epsilon: Tensor, *, schedule: NoiseSchedule, s: Tensor, nu: float = 0.7
) -> GaussianTransition:
    """Return the coefficient-preserving step: std = σ_s·sin(νπ/2), mean = α_s·x̂_0 + σ_s·cos(νπ/2)·ε̂.

    Source: Wang & Yu, 2025, "Coefficients-Preserving Sampling", https://arxiv.org/abs/2509.05952.

    Args:
        pred_x0: [B, ...] x̂_0 at the current time.
        pred_epsilon: [B, ...] ε̂ at the current time.
        schedule: The process that s belongs to.
        s: [B] the next time.
        nu: The share of fresh noise, in [0, 1].

    Raises:
        ValueError: `nu` is outside [0, 1].
    """
    if not 0 <= nu <= 1:
        raise ValueError(f"nu must be in [0, 1], got {nu}")
    sigma_s = schedule.sigma(s)
    epsilon_scale = sigma_s * math.cos(nu * math.pi / 2)
    mean = broadcast_to(schedule.alpha(s), pred_x0) * pred_x0 + broadcast_to(epsilon_scale, pred_x0) * pred_epsilon
    return GaussianTransition(mean, sigma_s * math.sin(nu * math.pi / 2), deterministic=nu == 0)
