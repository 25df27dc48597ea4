"""DPOK: policy optimisation with a KL divergence to the pretrained model.

    max E[ α·R ] − β·E[ Σ_t KL(p_θ(x_{t−1} | x_t, c) ‖ p_pre(x_{t−1} | x_t, c)) ]

Source: Fan et al., 2023, "DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models",
https://arxiv.org/abs/2305.16381.
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from diffusion_gym.checks import checked_number

from .advantages import Advantages, Groups
from .experience.rollouts import Rollouts
from .kl import KL
from .losses import Surrogate, clipped_surrogate
from .training.policy_gradient import PolicyGradient


@final
@dataclass(kw_only=True, eq=False, repr=False)
class DPOK(PolicyGradient):
    """DPOK's objective with PPO's clipped ratio of each step, and a baseline of the group.

    Note:
        The code has a learned value function for a baseline (here: the group's other samples; or
        `advantages=Critic()`, of `agents`), and for the KL the squared distance of the predicted noises, which weighs
        the steps otherwise than the divergence in nats here.

    Source: Fan et al., 2023, algorithm 1, https://arxiv.org/abs/2305.16381.

    Args:
        n_epochs: Passes over a rollout (published: 5).
        rollouts: Each sample of a group with noise of its own.
        advantages: Each reward less the mean of the others of its group.
        kl: β/α of the KL's weight β and the reward's weight α (its code: 0.01/100).
        clip_range: Of the ratio of mean log-probs, see `DDPOIS`.
    """

    n_epochs: int = 5
    rollouts: Rollouts = Rollouts(group_size=4)
    advantages: Advantages = Groups()
    kl: KL | None = KL(0.01 / 100)
    clip_range: float = 1e-4

    def __post_init__(self) -> None:
        checked_number("clip_range", self.clip_range, "(0, inf)")
        super().__post_init__()

    def surrogate(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Surrogate:
        """Return PPO's clipped loss of each action."""
        return clipped_surrogate(log_prob, old_log_prob, advantages, clip_range=self.clip_range)
