"""The guidance scales that a distillation folds into its student."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from diffusion_gym.checks import checked_number
from diffusion_gym.parts import Part


class Guidance(Part, ABC):
    """How the teacher is guided, and what the student is told of it.

    Attributes:
        is_drawn: The scale differs between updates, so that the student learns to be told it.
    """

    is_drawn: bool = False

    @abstractmethod
    def scale(self, generator: torch.Generator) -> float:
        """Return the scale of an update."""


@dataclass(frozen=True)
class FixedGuidance(Guidance):
    """One scale for all: it becomes a part of the student, which draws with it in one pass, whatever it is told.

    Args:
        guidance_scale: w of classifier-free guidance; up to 1: none.

    Raises:
        ValueError: it is no number of at least 0.
    """

    guidance_scale: float = 4.0

    def __post_init__(self) -> None:
        checked_number("guidance_scale", self.guidance_scale, "[0, inf)")

    def scale(self, generator: torch.Generator) -> float:
        """Return w."""
        return self.guidance_scale


@dataclass(frozen=True)
class DrawnGuidance(Guidance):
    """A scale that is uniform between two, and told to the student by its guidance embedding.

    Source: Luo et al., 2023, "Latent Consistency Models", section 4.2, https://arxiv.org/abs/2310.04378.

    Note:
        One scale is drawn for each update, where the paper draws one for each image.

    Args:
        low: The least.
        high: The greatest.

    Raises:
        ValueError: they are not 1 ≤ low < high.
    """

    low: float = 1.0
    high: float = 6.0
    is_drawn = True

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            checked_number(name, getattr(self, name), "[1, inf)")
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}: one scale is FixedGuidance(w)")

    def scale(self, generator: torch.Generator) -> float:
        """Return a draw."""
        return self.low + (self.high - self.low) * float(torch.rand((), generator=generator))
