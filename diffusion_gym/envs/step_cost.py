"""The cost of an episode's network calls, taken from its reward."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ..checks import checked_number
from ..rewards import Reward

StepCostName = Literal["none", "discount", "linear"]


@dataclass(frozen=True)
class StepCost:
    """Turns the reward R of an image that took N network calls into the episode's return.

        none:      R
        discount:  R·(1 − γ^N) / (N·(1 − γ)), the mean over the steps of the discounted reward to come; R at γ = 1
        linear:    R − λ·N

    Source: Ye et al., 2024, "Schedule On the Fly" (discount), https://arxiv.org/abs/2412.01243.

    Args:
        name: One of the three costs above.
        gamma: γ in (0, 1] of "discount".
        weight: λ ≥ 0 of "linear", in the reward's unit per call.

    Raises:
        ValueError: an argument is out of its range, or one that the step cost does not look at.
    """

    name: StepCostName = "none"
    gamma: float = 0.97
    weight: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in get_args(StepCostName):
            raise ValueError(f"step_cost must be one of {get_args(StepCostName)}, got {self.name!r}")
        checked_number("gamma", self.gamma, "(0, 1]")
        checked_number("step_cost_weight", self.weight, "[0, inf)")
        if self.weight and self.name != "linear":
            raise ValueError(f'step_cost_weight={self.weight} needs step_cost="linear", got {self.name!r}')
        if self.gamma != StepCost.gamma and self.name != "discount":
            raise ValueError(f'gamma={self.gamma} needs step_cost="discount", got {self.name!r}')

    def require_sign(self, reward: Reward) -> None:
        """Check that the discount makes long episodes worse.

        Raises:
            ValueError: the reward may be negative: discounting a loss makes it smaller, so more steps would earn more.
        """
        if self.name == "discount" and self.gamma < 1 and reward.range[0] < 0:
            raise ValueError(
                f'step_cost="discount" pays for more steps where the reward is negative, and {reward.name!r} has the '
                f'range {reward.range}: use step_cost="linear", a reward that is never negative, or allow_negative=True'
            )

    def __call__(self, rewards: Tensor, nfe: Tensor) -> Tensor:
        """Return the returns [B] of rewards [B] that took `nfe` [B] network calls."""
        calls = nfe.to(rewards.dtype)
        if self.name == "linear":
            return rewards - self.weight * calls
        if self.name == "none" or self.gamma == 1:
            return rewards
        return rewards * (1 - self.gamma**calls) / (calls * (1 - self.gamma))
