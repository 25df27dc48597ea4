"""Checks that anyone can run on an environment, a model or a reward of their own."""

from .report import Report
from .vector_env import check_vector_env

__all__ = ["Report", "check_vector_env"]
