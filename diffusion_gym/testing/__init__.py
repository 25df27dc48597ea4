"""Checks that anyone can run on an environment, a model or a reward of their own."""

from .model import check_model
from .report import Report
from .reward import check_reward
from .vector_env import check_vector_env

__all__ = ["Report", "check_model", "check_reward", "check_vector_env"]
