"""Algorithms that train a diffusion model inside `diffusion_gym`'s environments, and the parts that they are given."""

from .advantages import Batch, Groups, PerPrompt, PromptMeans
from .callbacks import HeldOutEvaluation, SampleGrid
from .consistency import ConsistencyDistillation, ConsistencyTraining, Latents, Trajectories, TrajectoryRegression
from .critic import Critic, ValueNetwork
from .ddpo import DDPOIS, DDPOSF
from .dpok import DPOK
from .evaluation import Evaluation, evaluate
from .experience.collection import collect
from .experience.replay import Replay
from .experience.rollouts import Rollout, Rollouts
from .grpo import GRPO
from .kl import KL
from .logs.run_log import Log
from .losses import Surrogate
from .nft import DiffusionNFT
from .policies import ContextFreeSchedule, DenoisingPolicy, FixedSchedule, Full, LoRA, Only, Policy, TimePredictor
from .rloo import RLOO
from .runs.checkpoints import Checkpoints
from .rwr import RWR, Best, Softmax
from .steps import Steps, Window
from .training.algorithm import Algorithm
from .training.learner import Cosine, Learner
from .training.policy_gradient import PolicyGradient
from .training.regression import Noising, Regression
from .updates.distributed import Processes
from .updates.optimizers import AdamW, Muon

__all__ = [
    "DDPOIS",
    "DDPOSF",
    "DPOK",
    "GRPO",
    "KL",
    "RLOO",
    "RWR",
    "AdamW",
    "Algorithm",
    "Batch",
    "Best",
    "Checkpoints",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "ContextFreeSchedule",
    "Cosine",
    "Critic",
    "DenoisingPolicy",
    "DiffusionNFT",
    "Evaluation",
    "FixedSchedule",
    "Full",
    "Groups",
    "HeldOutEvaluation",
    "Latents",
    "Learner",
    "LoRA",
    "Log",
    "Muon",
    "Noising",
    "Only",
    "PerPrompt",
    "Policy",
    "PolicyGradient",
    "Processes",
    "PromptMeans",
    "Regression",
    "Replay",
    "Rollout",
    "Rollouts",
    "SampleGrid",
    "Softmax",
    "Steps",
    "Surrogate",
    "TimePredictor",
    "Trajectories",
    "TrajectoryRegression",
    "ValueNetwork",
    "Window",
    "collect",
    "evaluate",
]
