"""Reward-weighted regression (RWR): a diffusion model is fine-tuned on its own samples, the better ones more.

Source: Black et al., 2023, section 4.2, https://arxiv.org/abs/2305.13301; Lee et al., 2023 (RWR-sparse),
https://arxiv.org/abs/2302.12192; Peters & Schaal, 2007.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from diffusion_gym import transfer
from diffusion_gym.checks import checked_number
from diffusion_gym.parts import Part

from .advantages import normalise, warn_of_lonely
from .experience.replay import Replay
from .logs.diagnostics import Metrics, effective_sample_size
from .training.regression import Noised, Regression


def softmax_weights(rewards: Tensor, *, inverse_temperature: float, groups: np.ndarray | None = None) -> Tensor:
    """Return w_i = n·softmax(β·r)_i, [N]: over all samples, or within each group of n.

    Source: Black et al., 2023, section 4.2, https://arxiv.org/abs/2305.13301; jannerm/ddpo.

    Args:
        rewards: [N].
        inverse_temperature: β.
        groups: [N] equal numbers belong together; None: all do.
    """
    if groups is None:
        return len(rewards) * torch.softmax(inverse_temperature * rewards, 0)
    weights = torch.empty_like(rewards)
    for group in np.unique(groups):
        mine = torch.from_numpy(groups == group).to(rewards.device)
        weights[mine] = softmax_weights(rewards[mine], inverse_temperature=inverse_temperature)
    return weights


def best_weights(rewards: Tensor, *, share: float, groups: np.ndarray | None = None) -> Tensor:
    """Return 1 for the best share of samples, at least one, and 0 for the rest, [N] (RWR-sparse).

    Of samples that are equally good, those that are kept lie evenly among the others.

    Args are those of `softmax_weights`, and:
        share: How many are kept, in (0, 1].
    """
    if groups is None:
        golden = (5**0.5 - 1) / 2  # the fractions of its multiples: any first few of them are spread over [0, 1)
        spread = (torch.arange(len(rewards), dtype=torch.float64) * golden).frac().argsort().to(rewards.device)
        best = spread[rewards[spread].argsort(descending=True, stable=True)]
        return torch.zeros_like(rewards).index_fill(0, best[: max(1, round(share * len(rewards)))], 1.0)
    weights = torch.empty_like(rewards)
    for group in np.unique(groups):
        mine = torch.from_numpy(groups == group).to(rewards.device)
        weights[mine] = best_weights(rewards[mine], share=share)
    return weights


class Weights(Part, ABC):
    """How much each finished sample counts in the regression."""

    per_prompt: bool

    def groups_of(self, replay: Replay) -> np.ndarray | None:
        """Return the numbers, [N], of the groups that are weighed for themselves; None: all are one."""
        if not self.per_prompt:
            return None
        warn_of_lonely(replay.prompts, "its weight is 1, whatever its reward")
        return replay.prompts

    @abstractmethod
    def of(self, replay: Replay) -> Tensor:
        """Return the samples' weights, [N]."""


@final
@dataclass(frozen=True)
class Softmax(Weights):
    """w_i = N·softmax(β·r)_i.

    Note:
        With raw rewards β means something else for every reward: β = 0.2 on an aesthetic score (standard deviation 0.4)
        leaves 99 % of the samples effective, which is plain fine-tuning, and on kilobytes of large JPEGs (30) two or
        three of 10,000. Hence `normalise`; the published code has raw rewards.

    Args:
        inverse_temperature: β > 0 (published: 0.2, on raw rewards).
        normalise: Subtract the rollout's mean reward and divide by its standard deviation first.
        per_prompt: Weigh the samples of each prompt against each other alone, as the paper writes; the published code
            does so for the aesthetic reward only. Needs several samples of each prompt in a rollout: one that is alone
            has a weight of 1, and there is a warning.

    Raises:
        ValueError: β is out of its range.
    """

    inverse_temperature: float = 1.0
    normalise: bool = True
    per_prompt: bool = False

    def __post_init__(self) -> None:
        checked_number("inverse_temperature", self.inverse_temperature, "(0, inf)")

    def of(self, replay: Replay) -> Tensor:
        """Return the samples' weights, [N]; their mean is 1."""
        rewards = normalise(replay.rewards, epsilon=1e-8) if self.normalise else replay.rewards
        return softmax_weights(rewards, inverse_temperature=self.inverse_temperature, groups=self.groups_of(replay))


@final
@dataclass(frozen=True)
class Best(Weights):
    """1 for the best share of the samples, and 0 for the others (RWR-sparse).

    Args:
        share: The share, in (0, 1] (published: 0.1).
        per_prompt: Keep that share of each prompt's samples, see `Softmax`.

    Raises:
        ValueError: the share is out of its range.
    """

    share: float = 0.1
    per_prompt: bool = False

    def __post_init__(self) -> None:
        checked_number("share", self.share, "(0, 1]")

    def of(self, replay: Replay) -> Tensor:
        """Return the samples' weights, [N]: 0 or 1."""
        return best_weights(replay.rewards, share=self.share, groups=self.groups_of(replay))


@final
@dataclass(kw_only=True, eq=False, repr=False)
class RWR(Regression):
    """Reward-weighted regression, dense (`Softmax`) or sparse (`Best`, RWR-sparse).

        w_i = N·softmax(β·r)_i    L = mean_i w_i·‖ε − ε̂_θ(α_t·x_0 + σ_t·ε, t, c_i)‖²/D,  one random t and ε each

    It learns from (prompt, x_0, reward) alone: no trajectories and no log-probs, so also from images on disk, see
    `fit`. It is no policy gradient, but regression to the tilted distribution p(x_0|c)·exp(β·r(x_0)), round by round.
    (Paper: a learning rate of 1e-5, 10,240 samples per rollout, batches of 128.)

    Source: Black et al., 2023, section 4.2, https://arxiv.org/abs/2305.13301; jannerm/ddpo.

    Args:
        n_epochs: Passes over a rollout, each with fresh noise (paper: 5; sparse 50).
        weights: What each sample counts: `Softmax(…)` or `Best(…)`.
    """

    n_epochs: int = 5
    weights: Weights = Softmax()

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Weights):
            raise TypeError(f"weights must be Softmax(…) or Best(…), got {self.weights!r}")
        super().__post_init__()

    def weights_of(self, replay: Replay) -> Tensor:
        """Return the samples' weights, [N]."""
        return self.weights.of(replay)

    def rows_of(self, weights: Tensor) -> np.ndarray:
        """Return the samples whose weight is not 0."""
        return np.flatnonzero(transfer.to_host(weights))

    def losses_of(self, noised: Noised, weights: Tensor) -> dict[str, Tensor]:
        """Return the weighted squared error of each sample's predicted noise."""
        error = (noised.predicted_by(self.policy).epsilon - noised.noise).square().flatten(1).mean(1)
        return {"loss": weights * error}

    def metrics_of(self, weights: Tensor) -> Metrics:
        """Return the effective sample size."""
        return {"effective_sample_size": effective_sample_size(weights)}
