"""GRPO on diffusion models, as Flow-GRPO and DanceGRPO have it.

    A_k = (R_k − mean of the group) / std,    L = E[ max(−A·ρ_t, −A·clip(ρ_t, 1 ± clip_range)) ] + β·E[ KL_t ]

Source: Shao et al., 2024 (GRPO), https://arxiv.org/abs/2402.03300; Liu et al., 2025 (Flow-GRPO),
https://arxiv.org/abs/2505.05470.
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from diffusion_gym.checks import checked_number

from .advantages import Advantages, Groups
from .experience.rollouts import Rollouts
from .losses import Surrogate, clipped_surrogate
from .training.algorithm import LearningRate
from .training.policy_gradient import PolicyGradient


@final
@dataclass(kw_only=True, eq=False, repr=False)
class GRPO(PolicyGradient):
    """GRPO with the settings of Flow-GRPO's code; others are named by what they change.

        Flow-GRPO         GRPO(policy, env, kl=KL(0.04 / num_steps))
        Flow-GRPO-Fast    GRPO(policy, env, kl=KL(0.04 / num_steps), steps=Steps(window=Window(2)))
        GRPO's paper      GRPO(policy, env, advantages=Groups("group_mean", scale="group"))

    Note:
        Flow-GRPO's published β, 0.04, multiplies KL_t·|Δt|, for its code leaves Δt out of the variance; here the KL
        divergence is in nats, and |Δt| is about 1/num_steps. Its paper divides by the group's standard deviation, its
        configurations by that of all rewards. What it has besides: groups of 24; it leaves out samples whose advantage
        is 0, and the last step.

    Source: Liu et al., 2025, https://arxiv.org/abs/2505.05470; yifan123/flow_grpo.

    Args:
        learning_rate: For LoRA (Flow-GRPO: 3e-4; a whole UNet: 1e-5).
        rollouts: Each sample of a group with noise of its own.
        advantages: Each reward less its group's mean, over the standard deviation of all rewards.
        clip_range: Of the ratio of mean log-probs, see `DDPOIS`.
    """

    learning_rate: LearningRate = 1e-4
    rollouts: Rollouts = Rollouts(group_size=4)
    advantages: Advantages = Groups("group_mean", scale="global", clip=5.0)
    clip_range: float = 1e-4

    def __post_init__(self) -> None:
        checked_number("clip_range", self.clip_range, "(0, inf)")
        super().__post_init__()

    def surrogate(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Surrogate:
        """Return PPO's clipped loss of each action."""
        return clipped_surrogate(log_prob, old_log_prob, advantages, clip_range=self.clip_range)
