"""One step of denoising as a Gaussian, the same for all samplers.

A step from t to a cleaner s is

    x_s | x_t  ~  N( α_s·x̂_0 + epsilon·ε̂ ,  std² )

DDIM, CPS and Consistency keep the noise level of the process, epsilon = √(σ_s² − std²) with 0 ≤ std ≤ σ_s, and so
differ in std alone. FlowSDE does not: it discretises an SDE, and keeps that level in the limit of fine steps.

Each sample of a batch has its own t and s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .predictions import broadcast_to
from .samplers import Scales
from .transfer import to_device

Reduction = Literal["sum", "mean"]


def reduce_dimensions(values: Tensor, reduction: Reduction) -> Tensor:
    """Return the sum or the mean of `values` [B, ...] over all dimensions but the batch's, [B]."""
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
    rows = [
        torch.randn(like.shape[1:], generator=generator, device=generator.device, dtype=like.dtype)
        for generator in generators
    ]
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
        """Return the log-density log p(x_s = value | x_t), [B]: Σ_d −(value − mean)²/(2·std²) − log std − ½·log 2π.

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
            raise ValueError(
                "a deterministic transition has no density to score: sample with noise, such as DDIM(eta) with eta > 0"
            )
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
            raise ValueError(
                "the KL divergence of a deterministic transition is not defined: sample with noise, such as DDIM(eta) "
                "with eta > 0"
            )
        stochastic = broadcast_to((self.std > 0) | (other.std > 0), self.mean)
        std, other_std = (torch.where(stochastic, broadcast_to(side.std, self.mean), 1.0) for side in (self, other))
        divergence = torch.log(other_std / std) + (std**2 + (self.mean - other.mean) ** 2) / (2 * other_std**2) - 0.5
        return reduce_dimensions(torch.where(stochastic, divergence, 0.0), reduction)

    def entropy(self) -> Tensor:
        """Return the differential entropy, [B]: Σ_d ½·log(2πe·std²).

        Note:
            It is 0 where std is 0, as the log-density is in `log_prob`.
        """
        std = torch.where(self.std > 0, self.std, 1.0)
        per_dimension = torch.where(self.std > 0, std.log() + math.log(2 * math.pi * math.e) / 2, 0.0)
        return self.mean[0].numel() * per_dimension


def transition(pred_x0: Tensor, pred_epsilon: Tensor, scales: Scales) -> GaussianTransition:
    """Return the step of any sampler: N(x0·x̂_0 + epsilon·ε̂, std²).

    Args:
        pred_x0: [B, ...] x̂_0 at t, float32 or float64.
        pred_epsilon: [B, ...] ε̂ at t.
        scales: The sampler's factors of them.
    """
    mean = broadcast_to(scales.x0, pred_x0) * pred_x0 + broadcast_to(scales.epsilon, pred_x0) * pred_epsilon
    return GaussianTransition(mean, scales.std, scales.deterministic)
