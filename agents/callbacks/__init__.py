"""Callbacks for `learn`, in Stable-Baselines3's manner."""

from .held_out import HeldOutEvaluation

__all__ = ["HeldOutEvaluation"]
