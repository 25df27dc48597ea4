"""A reward in standard deviations from its mean."""

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from .. import transfer
from ..checks import checked_integer, checked_number
from .base import Metadata, Reward, RewardFunction, RewardOutput, checked_output
from .compositions import RewardWrapper

_LEAST_STD = 1e-8
_ROUNDING = 16 * torch.finfo(torch.float32).eps


@final
class Normalised(RewardWrapper):
    """(r − mean) / std: rewards of different units on one scale, to be weighted in a `WeightedSum`.

    With given `mean` and `std` it is a function of image and prompt like any other reward. Without them they are those
    of all values seen so far, the present batch's included; std is the population's, at least 1e-8; values that differ
    by no more than the rounding of float32 (std ≤ 16 units in the last place of the mean) are all 0. Such a reward
    drifts while it learns them: an image's reward depends on those before it, so evaluate with another one, and give
    `learn_from` to end it. Its statistics are saved in checkpoints, and a resumed training goes on with them. Where
    many processes train together each would learn its own, which is refused: give mean and std there.

    Source: Chan, Golub and LeVeque, 1979 (merging the statistics of batches, equations 2.1),
    http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf

    Args:
        reward: The other reward; its values are reported as an extra.
        mean: The mean to subtract; None: learnt.
        std: The standard deviation to divide by, positive; None: learnt.
        learn_from: The values that are learnt from (the batch that completes them is taken whole); None: all.

    Attributes:
        count: The values learnt from so far.

    Raises:
        ValueError: one of mean and std is given without the other, or an argument is out of its range.
    """

    def __init__(
        self,
        reward: str | Reward | RewardFunction | Mapping[str, float],
        *,
        mean: float | None = None,
        std: float | None = None,
        learn_from: int | None = None,
    ) -> None:
        super().__init__(reward)
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std are given together, or learnt together: got mean={mean}, std={std}")
        if learn_from is not None and std is not None:
            raise ValueError(f"learn_from is given where mean and std are not, got learn_from={learn_from}")
        self.is_fixed = std is not None
        self.learn_from = None if learn_from is None else checked_integer("learn_from", learn_from, at_least=1)
        self.count = 0
        self._mean = 0.0 if mean is None else checked_number("mean", mean)
        self._squares = 0.0
        self._std = 0.0 if std is None else checked_number("std", std, "(0, inf)")
        self.name = f"normalised_{self.reward.name}"
        self.unit = "standard deviations"
        if self.is_fixed:
            low, high = ((bound - self.mean) / self.std for bound in self.reward.range)
            self.range = (low, high)
        else:
            self.range = (-float("inf"), float("inf"))

    @property
    def mean(self) -> float:
        """The mean that is subtracted now."""
        return self._mean

    @property
    def std(self) -> float:
        """The standard deviation that is divided by now."""
        return self._std if self.is_fixed else max(math.sqrt(self._squares / max(self.count, 1)), _LEAST_STD)

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        output = checked_output(self.reward, images, prompts, metadata)
        if not self.is_fixed and (self.learn_from is None or self.count < self.learn_from):
            self._learn(output.values)
        is_rounding = not self.is_fixed and self.std <= _ROUNDING * abs(self.mean)
        normalised = (output.values - self.mean) / (math.inf if is_rounding else self.std)
        return RewardOutput(normalised, {**output.extras, self.reward.name: output.values})

    def _learn(self, values: Tensor) -> None:
        """Merge a batch of m values with n before: mean += δ·m/(n+m), Σ(x − mean)² += the batch's + δ²·nm/(n+m)."""
        batch = torch.from_numpy(transfer.to_host(values)).double()  # on the host: Apple's GPUs have no float64
        if not torch.isfinite(batch).all():  # the environment says so, and the statistics stay whole
            return
        num, total = len(batch), self.count + len(batch)
        difference = float(batch.mean()) - self._mean
        self._squares += float((batch - batch.mean()).square().sum()) + difference**2 * self.count * num / total
        self._mean += difference * num / total
        self.count = total

    @override
    def state_dict(self) -> dict[str, object]:
        state: dict[str, object] = {}
        inner_state = self.reward.state_dict()
        if not self.is_fixed:
            state["normalised"] = {"count": self.count, "mean": self._mean, "squares": self._squares}
        return state | ({"reward": inner_state} if inner_state else {})

    @override
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        statistics, inner_state = state.get("normalised"), state.get("reward", {})
        if (
            not isinstance(inner_state, Mapping)
            or state.keys() - {"normalised", "reward"}
            or (statistics and self.is_fixed)
        ):
            raise ValueError(f"the state given is not that of {self.name!r}: it has {sorted(state)}")
        self.reward.load_state_dict(inner_state)
        if isinstance(statistics, Mapping):
            self.count, self._mean, self._squares = (
                int(statistics["count"]),
                float(statistics["mean"]),
                float(statistics["squares"]),
            )
