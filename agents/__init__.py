"""Policy-gradient algorithms that train a diffusion model inside `diffusion_gym`'s environments."""

from .ddpo import DDPOIS, DDPOSF
from .evaluation import Evaluation, evaluate
from .policies import DenoisingPolicy, Policy
from .rollouts import Rollout, collect

__all__ = ["DDPOIS", "DDPOSF", "DenoisingPolicy", "Evaluation", "Policy", "Rollout", "collect", "evaluate"]
