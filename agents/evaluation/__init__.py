"""Evaluations of a policy where it was not trained: on held-out seeds, prompts and rewards."""

from .episodes import Evaluation, evaluate, standard_error

__all__ = ["Evaluation", "evaluate", "standard_error"]
