"""How good a policy is where it was not trained: held-out seeds, prompts and rewards."""

from .episodes import Evaluation, evaluate, standard_error

__all__ = ["Evaluation", "evaluate", "standard_error"]
