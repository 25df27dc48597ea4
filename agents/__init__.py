"""Policy-gradient algorithms that train a diffusion model inside `diffusion_gym`'s environments."""

from .algorithm import Algorithm
from .checkpoints import Checkpoints
from .ddpo import DDPOIS, DDPOSF
from .distributed import Processes
from .evaluation import Evaluation, HeldOutEvaluation, evaluate
from .nft import DiffusionNFT
from .policies import ContextFreeSchedule, DenoisingPolicy, FixedSchedule, Policy, TimePredictor
from .replay import Replay
from .rloo import RLOO
from .rollouts import Rollout, collect
from .rwr import RWR

__all__ = [
    "DDPOIS",
    "DDPOSF",
    "RLOO",
    "RWR",
    "Algorithm",
    "Checkpoints",
    "ContextFreeSchedule",
    "DenoisingPolicy",
    "DiffusionNFT",
    "Evaluation",
    "FixedSchedule",
    "HeldOutEvaluation",
    "Policy",
    "Processes",
    "Replay",
    "Rollout",
    "TimePredictor",
    "collect",
    "evaluate",
]
