"""The network that a consistency function is compared with: an average of its past, or itself."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from diffusion_gym.checks import checked_number
from diffusion_gym.parts import Part


class Target(Part, ABC):
    """θ⁻, which has no gradient: θ⁻ ← μ·θ⁻ + (1 − μ)·θ after each update.

    Attributes:
        is_itself: μ is 0, and needs no network of its own.
    """

    is_itself: bool = False

    @abstractmethod
    def decay(self, num_intervals: int | None) -> float:
        """Return μ, for the number of intervals that time is divided into at this moment."""


@dataclass(frozen=True)
class Itself(Target):
    """θ⁻ = θ: consistency training needs no average; distillation has 1.5 to 2.5 times the error without one.

    Source: Song & Dhariwal, 2024, section 3.2, https://arxiv.org/abs/2310.14189.
    """

    is_itself = True

    def decay(self, num_intervals: int | None) -> float:
        """Return 0."""
        return 0.0


@dataclass(frozen=True)
class Averaged(Target):
    """A constant μ, as consistency distillation has it.

    Args:
        mu: μ in (0, 1).

    Raises:
        ValueError: it is not.
    """

    mu: float = 0.95

    def __post_init__(self) -> None:
        checked_number("mu", self.mu, "(0, 1)")

    def decay(self, num_intervals: int | None) -> float:
        """Return μ."""
        return self.mu


@dataclass(frozen=True)
class GrowingAverage(Target):
    """μ(k) = exp(s_0·ln μ_0/N(k)), as the published consistency training has it.

    Source: Song et al., 2023, appendix C, https://arxiv.org/abs/2303.01469.

    Args:
        mu: μ_0 in (0, 1).
        first: s_0.

    Raises:
        ValueError: a number is out of its range.
    """

    mu: float = 0.95
    first: int = 2

    def __post_init__(self) -> None:
        checked_number("mu", self.mu, "(0, 1)")
        checked_number("first", self.first, "[1, inf)")

    def decay(self, num_intervals: int | None) -> float:
        """Return μ(k).

        Raises:
            ValueError: the times are not divided into a number of intervals.
        """
        if num_intervals is None:
            raise ValueError("GrowingAverage needs a number of levels, such as that of GrowingLevels()")
        return math.exp(self.first * math.log(self.mu) / num_intervals)
