"""Denoising diffusion policy optimisation (DDPO): the score-function and the importance-sampled estimator.

    DDPO-SF   ∇J = E[ Σ_t ∇log p_θ(x_{t−1} | x_t, c)·A ]
    DDPO-IS   L = E[ max(−A·ρ, −A·clip(ρ, 1 ± clip_range)) ],  ρ = p_θ(x_{t−1} | x_t, c) / p_old(x_{t−1} | x_t, c)

Source: Black et al., 2023, "Training Diffusion Models with Reinforcement Learning", https://arxiv.org/abs/2305.13301.
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from diffusion_gym.checks import checked_number

from .advantages import Advantages, PerPrompt
from .experience.rollouts import Rollouts
from .losses import Surrogate, clipped_surrogate, score_function_surrogate
from .training.policy_gradient import PolicyGradient


@final
@dataclass(kw_only=True, eq=False, repr=False)
class DDPOSF(PolicyGradient):
    """DDPO with the score-function estimator (REINFORCE): strictly on-policy, one update per rollout by default.

    ∇J is averaged over episodes and, as in the published code, over time and (with log-probs reduced by "mean") over
    dimensions, which is the paper's up to a factor. (Paper: a learning rate of 1e-5, with LoRA 3e-4.) With a
    `batch_size` below the rollout's the later updates are off-policy, which this estimator does not correct.

    Source: Black et al., 2023, eq. 4, https://arxiv.org/abs/2305.13301. No published code has it as its own loss.

    Args:
        rollouts: Paper: 256 samples.
        advantages: ddpo-pytorch's statistics of the last rewards of each prompt.
    """

    rollouts: Rollouts = Rollouts(samples=256)
    advantages: Advantages = PerPrompt(16)

    def surrogate(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Surrogate:
        """Return −A·log π of each action."""
        return score_function_surrogate(log_prob, advantages)


@final
@dataclass(kw_only=True, eq=False, repr=False)
class DDPOIS(PolicyGradient):
    """DDPO with the importance-sampled estimator: several updates per rollout, with PPO's clipped ratio.

    Source: Black et al., 2023, eq. 5 and appendix D, https://arxiv.org/abs/2305.13301; ddpo-pytorch train.py.

    Args:
        batch_size: Images per optimizer step (paper: 64 of 256, so 4 updates per rollout).
        rollouts: Paper: 256 samples.
        advantages: ddpo-pytorch's statistics of the last rewards of each prompt.
        clip_range: Of the ratio of *mean* log-probs over the D dimensions: the true ratio is clipped at exp(±
            D·clip_range). The published 1e-4 is for D = 16,384 (Stable Diffusion's latents); for the same with the
            emoji's 1,024 take 1.6e-3, since with 1e-4 nearly all of a rollout's second update is clipped.
    """

    batch_size: int | None = 64
    rollouts: Rollouts = Rollouts(samples=256)
    advantages: Advantages = PerPrompt(16)
    clip_range: float = 1e-4

    def __post_init__(self) -> None:
        checked_number("clip_range", self.clip_range, "(0, inf)")
        super().__post_init__()

    def surrogate(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Surrogate:
        """Return PPO's clipped loss of each action."""
        return clipped_surrogate(log_prob, old_log_prob, advantages, clip_range=self.clip_range)
