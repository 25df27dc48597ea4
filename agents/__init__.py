"""Policy-gradient algorithms that train a diffusion model inside `diffusion_gym`'s environments."""

from .ddpo import DDPOIS, DDPOSF
from .evaluation import Evaluation, evaluate
from .policies import ContextFreeSchedule, DenoisingPolicy, FixedSchedule, Policy, TimePredictor
from .rloo import RLOO
from .rollouts import Rollout, collect

__all__ = [
    "DDPOIS",
    "DDPOSF",
    "RLOO",
    "ContextFreeSchedule",
    "DenoisingPolicy",
    "Evaluation",
    "FixedSchedule",
    "Policy",
    "Rollout",
    "TimePredictor",
    "collect",
    "evaluate",
]
