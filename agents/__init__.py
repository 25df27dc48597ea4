"""Policy-gradient algorithms that train a diffusion model inside `diffusion_gym`'s environments."""

from .callbacks import HeldOutEvaluation
from .ddpo import DDPOIS, DDPOSF
from .evaluation import Evaluation, evaluate
from .experience.collection import collect
from .experience.replay import Replay
from .experience.rollouts import Rollout, Rollouts
from .nft import DiffusionNFT
from .policies import ContextFreeSchedule, DenoisingPolicy, FixedSchedule, Policy, TimePredictor
from .rloo import RLOO
from .runs.checkpoints import Checkpoints
from .rwr import RWR
from .training.algorithm import Algorithm
from .updates.distributed import Processes

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
    "Rollouts",
    "TimePredictor",
    "collect",
    "evaluate",
]
