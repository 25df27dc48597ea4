"""Consistency models that learn: distillation from a teacher, training without one, and the parts of both."""

from .data import Latents, Trajectories
from .guidance import DrawnGuidance, FixedGuidance, Guidance
from .learners import ConsistencyDistillation, ConsistencyLearner, ConsistencyTraining, TrajectoryRegression
from .metrics import L1, L2, LPIPS, InverseGap, Metric, PseudoHuber, UniformWeight, Weighting
from .recipes import easy, improved
from .solvers import Euler, Heun, Solver
from .targets import Averaged, GrowingAverage, Itself, Target
from .times import (
    Discretisation,
    DoublingLevels,
    EveryIndex,
    GrowingLevels,
    KarrasLevels,
    LogNormalTimes,
    ShrinkingGap,
    TimeSampling,
    UniformTimes,
)

__all__ = [
    "L1",
    "L2",
    "LPIPS",
    "Averaged",
    "ConsistencyDistillation",
    "ConsistencyLearner",
    "ConsistencyTraining",
    "Discretisation",
    "DoublingLevels",
    "DrawnGuidance",
    "Euler",
    "EveryIndex",
    "FixedGuidance",
    "GrowingAverage",
    "GrowingLevels",
    "Guidance",
    "Heun",
    "InverseGap",
    "Itself",
    "KarrasLevels",
    "Latents",
    "LogNormalTimes",
    "Metric",
    "PseudoHuber",
    "ShrinkingGap",
    "Solver",
    "Target",
    "TimeSampling",
    "Trajectories",
    "TrajectoryRegression",
    "UniformTimes",
    "UniformWeight",
    "Weighting",
    "easy",
    "improved",
]
