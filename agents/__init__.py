"""Policy-gradient algorithms that train a diffusion model inside `diffusion_gym`'s environments."""

from .callbacks import HeldOutEvaluation
from .ddpo import DDPOIS, DDPOSF
from .evaluation import Evaluation, evaluate
from .experience.replay import Replay
from .experience.rollouts import Rollout, collect
from .nft import DiffusionNFT
from .policies import ContextFreeSchedule, DenoisingPolicy, FixedSchedule, Full, LoRA, Only, Policy, TimePredictor
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
    "Full",
    "HeldOutEvaluation",
    "LoRA",
    "Only",
    "Policy",
    "Processes",
    "Replay",
    "Rollout",
    "TimePredictor",
    "collect",
    "evaluate",
]
