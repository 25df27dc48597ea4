"""Callbacks for `learn`, in Stable-Baselines3's manner."""

from .held_out import HeldOutEvaluation
from .sample_grid import SampleGrid

__all__ = ["HeldOutEvaluation", "SampleGrid"]
