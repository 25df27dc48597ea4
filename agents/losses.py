"""Policy-gradient losses as pure functions: one value per transition, to be averaged by the caller."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0


def _check_same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"all arguments must be vectors of one length, got {shapes}")


def bounded_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Return ρ = π/π_old of each row, [B], within e^±20, beyond which it has no gradient.

    A ratio that overflows would make NaN of an advantage of 0; and where PPO does not clip (A < 0, ρ > 1) a row of 1e9
    would be all of an update.
    """
    return torch.exp((log_prob - old_log_prob).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def score_function_loss(log_prob: Tensor, advantages: Tensor) -> Tensor:
    """Return the REINFORCE loss of each transition, [B]: −A·log π(a|s).

    Source: Williams, 1992; DDPO-SF, Black et al., 2023, eq. 4, https://arxiv.org/abs/2305.13301.

    Args:
        log_prob: [B] log π(a|s), with gradients.
        advantages: [B] A, without.
    """
    _check_same_shape(log_prob=log_prob, advantages=advantages)
    return -advantages * log_prob


def clipped_surrogate_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip_range: float) -> Tensor:
    """Return PPO's clipped loss of each transition, [B]: max(−A·ρ, −A·clip(ρ, 1 − c, 1 + c)), ρ = π / π_old.

    ρ is bounded, see `bounded_ratio`.

    Source: Schulman et al., 2017, eq. 7, https://arxiv.org/abs/1707.06347; DDPO-IS, Black et al., 2023, eq. 5,
    https://arxiv.org/abs/2305.13301.

    Args:
        log_prob: [B] log π(a|s), with gradients.
        old_log_prob: [B] log π_old(a|s) of the policy that sampled, with the same reduction.
        advantages: [B] A.
        clip_range: c. 1e-4 goes with log-probs averaged over dimensions, 0.2 with summed ones of few dimensions.
    """
    _check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
    ratio = bounded_ratio(log_prob, old_log_prob)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def clipped_surrogate_coefficients(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip_range: float
) -> Tensor:
    """Return c = ∂`clipped_surrogate_loss`/∂log π of each row, [B]: −A·ρ, and 0 where the clip holds.

    The gradient of the loss is that of c·log π with c held fixed, so the log-prob of a long trajectory can be
    differentiated step by step, once its ratio is known.

    Args are those of `clipped_surrogate_loss`, without gradients.
    """
    _check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
    ratio = bounded_ratio(log_prob, old_log_prob)
    held = torch.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    return torch.where(held | ((log_prob - old_log_prob).abs() > _MAX_LOG_RATIO), 0.0, -advantages * ratio)


@dataclass(frozen=True, eq=False)
class Surrogate:
    """What a loss says of M actions, as constants: its gradient is that of Σ coefficient·log π.

    So the log-prob of a whole trajectory is differentiated step by step, as that of a single step is.

    Args:
        loss: [M] the loss of each action.
        coefficient: [M] ∂loss/∂log π.
        metrics: [M] each: what else is logged, by name; the mean is.
    """

    loss: Tensor
    coefficient: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def score_function_surrogate(log_prob: Tensor, advantages: Tensor) -> Surrogate:
    """Return `score_function_loss` as a `Surrogate`; the arguments are without gradients."""
    return Surrogate(score_function_loss(log_prob, advantages), -advantages)


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip_range: float) -> Surrogate:
    """Return `clipped_surrogate_loss` as a `Surrogate`, with the share of ratios beyond the clip, `clip_fraction`.

    Args are those of `clipped_surrogate_loss`, without gradients.
    """
    outside = (torch.exp(log_prob - old_log_prob) - 1).abs() > clip_range
    return Surrogate(
        clipped_surrogate_loss(log_prob, old_log_prob, advantages, clip_range=clip_range),
        clipped_surrogate_coefficients(log_prob, old_log_prob, advantages, clip_range=clip_range),
        {"clip_fraction": outside.float()},
    )


def approximate_kl(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Return an unbiased, non-negative estimate of KL(π_old ‖ π) from each transition, [B]: (ρ − 1) − log ρ.

    Source: Schulman, 2020, "Approximating KL divergence" (k3), http://joschu.net/blog/kl-approx.html.
    """
    _check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    log_ratio = log_prob - old_log_prob
    return torch.expm1(log_ratio) - log_ratio
