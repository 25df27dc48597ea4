"""RLOO: REINFORCE leave-one-out, with PPO's clipped ratio, of whole trajectories or of steps.

    A_k = R_k − mean_{j≠k} R_j                                            among the K samples of a prompt
    trajectory:  L = E[ max(−A·ρ, −A·clip(ρ, 1 ± clip_range)) ],  ρ = Π_t π(a_t|s_t) / π_old(a_t|s_t)
    step:        the same with each step's own ρ_t

Source: Ahmadian et al., 2024, "Back to Basics", https://arxiv.org/abs/2402.14740; Ye et al., 2024 (TPDM), section 3.3,
https://arxiv.org/abs/2412.01243.
"""

import warnings
from dataclasses import dataclass
from typing import final, get_args

from torch import Tensor

from diffusion_gym.checks import checked_number

from .advantages import Advantages, Groups
from .experience.rollouts import Rollouts
from .losses import Surrogate, clipped_surrogate
from .training.algorithm import LearningRate
from .training.policy_gradient import PolicyGradient, Ratio
from .updates.optimizers import AdamW, Optimizer

_DEFAULT_CLIP = {"trajectory": 0.2, "step": 1e-4}


@final
@dataclass(kw_only=True, eq=False, repr=False)
class RLOO(PolicyGradient):
    """RLOO for any policy and any of the environments; of a time predictor it is TPDM's algorithm.

    A trajectory's gradient takes two passes over its steps: one without gradients for ρ, which the first update from a
    rollout does not need (ρ = 1), and one that goes back step by step with the coefficient that ρ gives.

    Whole groups are launched together and run to their ends. (Learning from the first episodes to end would teach short
    episodes.) With reward="reference_distance" a start that comes again, `Rollouts(num_starts=…)`, costs no new
    reference.

    Source: Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740; Ye et al., 2024, https://arxiv.org/abs/2412.01243.

    Args:
        learning_rate: For heads and LoRA (a whole UNet: 1e-5, the default of the others).
        optimizer: Without weight decay, which would pull a head's weights, that begin at 0, back to its first schedule.
        rollouts: The samples of a group start from the same noise, so that they differ by the policy's draws alone.
        advantages: Each reward less the mean of the others of its group.
        ratio: Of a whole "trajectory" or of each "step"; None: "step" where the policy moves latents, else
            "trajectory". A trajectory of latents is of so many dimensions that after one update its ratio is next to 0
            or immense: with more than one update of a rollout there is a warning.
        clip_range: None: 0.2 for trajectories (TPDM), 1e-4 for steps.
    """

    learning_rate: LearningRate = 1e-4
    optimizer: Optimizer = AdamW(weight_decay=0.0)
    rollouts: Rollouts = Rollouts(group_size=4, same_noise=True)
    advantages: Advantages = Groups()
    ratio: Ratio | None = None
    clip_range: float | None = None

    def __post_init__(self) -> None:
        if self.ratio not in (None, *get_args(Ratio)):
            raise ValueError(f"ratio must be None or one of {get_args(Ratio)}, got {self.ratio!r}")
        if self.clip_range is not None:
            checked_number("clip_range", self.clip_range, "(0, inf)")
        super().__post_init__()
        if self.ratio_of == "step":
            return
        num_updates = self.n_epochs * self.sizes.samples // self.sizes.batch
        if self.policy.moves_latents and num_updates > 1:
            warnings.warn(
                f"the ratio of a whole trajectory of latents is next to 0 or immense after one update, and there are "
                f'{num_updates} from each rollout: ratios are bounded at e^±20, but give ratio="step", or n_epochs=1 '
                "and batch_size=None",
                stacklevel=3,
            )

    @property
    def ratio_of(self) -> Ratio:
        """Whether ratios are of single steps or of whole trajectories."""
        return self.ratio or ("step" if self.policy.moves_latents else "trajectory")

    def surrogate(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Surrogate:
        """Return PPO's clipped loss of each action."""
        clip_range = _DEFAULT_CLIP[self.ratio_of] if self.clip_range is None else self.clip_range
        return clipped_surrogate(log_prob, old_log_prob, advantages, clip_range=clip_range)
