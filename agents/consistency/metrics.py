"""Distances between two consistency functions' outputs, and their weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_gym.checks import checked_number
from diffusion_gym.parts import Part

Decode = Callable[[Tensor], Tensor]


class Metric(Part, ABC):
    """A distance d(x, y) of at least 0, which is 0 where x = y."""

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor, decode: Decode) -> Tensor:
        """Return the distances, [B].

        Args:
            x: [B, ...] float32.
            y: [B, ...] float32.
            decode: A function that returns the images in [0, 1] of latents, with gradients.
        """


@dataclass(frozen=True)
class L1(Metric):
    """Σ|x − y|."""

    def __call__(self, x: Tensor, y: Tensor, decode: Decode) -> Tensor:
        """Return the distances, [B]."""
        return (x - y).abs().flatten(1).sum(1)


@dataclass(frozen=True)
class L2(Metric):
    """‖x − y‖², as consistency models' papers call it."""

    def __call__(self, x: Tensor, y: Tensor, decode: Decode) -> Tensor:
        """Return the distances, [B]."""
        return (x - y).square().flatten(1).sum(1)


@dataclass(frozen=True)
class PseudoHuber(Metric):
    """√(‖x − y‖² + c²) − c: far away the distance itself, whose gradient is never longer than 1.

    Source: Song & Dhariwal, 2024, "Improved Techniques for Training Consistency Models", section 3.3,
    https://arxiv.org/abs/2310.14189.

    Args:
        c: Where it turns from a square into a distance, positive; None: 0.00054·√D of D dimensions.

    Raises:
        ValueError: `c` is not positive.
    """

    c: float | None = None

    def __post_init__(self) -> None:
        if self.c is not None:
            checked_number("c", self.c, "(0, inf)")

    def __call__(self, x: Tensor, y: Tensor, decode: Decode) -> Tensor:
        """Return the distances, [B]."""
        c = 0.00054 * x[0].numel() ** 0.5 if self.c is None else self.c
        return ((x - y).square().flatten(1).sum(1) + c**2).sqrt() - c


@cache
def _perceptual(network: str, device: torch.device) -> Any:
    """Return LPIPS' network; raises ImportError."""
    try:
        import lpips
    except ImportError as error:
        raise ImportError("LPIPS() needs lpips: pip install 'diffusion-gym[lpips]'") from error
    return lpips.LPIPS(net=network, verbose=False).to(device).requires_grad_(False)


@dataclass(frozen=True)
class LPIPS(Metric):
    """The distance of deep features of the decoded images; needs the extra `lpips`, which fetches a network.

    Source: Zhang et al., 2018, https://arxiv.org/abs/1801.03924.

    Args:
        network: "vgg", "alex" or "squeeze".
        size: The images are enlarged or reduced to this many pixels (consistency models: 224).
    """

    network: str = "vgg"
    size: int = 224

    def __call__(self, x: Tensor, y: Tensor, decode: Decode) -> Tensor:
        """Return the distances, [B].

        Raises:
            ImportError: lpips is missing.
        """
        first, second = (F.interpolate(decode(latents) * 2 - 1, size=self.size, mode="bilinear") for latents in (x, y))
        return _perceptual(self.network, x.device)(first, second).flatten()


class Weighting(Part, ABC):
    """λ, the weight of a pair of times."""

    @abstractmethod
    def __call__(self, tau_t: Tensor, tau_s: Tensor) -> Tensor:
        """Return the weights, [B], of pairs of noise ratios τ_t > τ_s, [B] each."""


@dataclass(frozen=True)
class UniformWeight(Weighting):
    """λ = 1."""

    def __call__(self, tau_t: Tensor, tau_s: Tensor) -> Tensor:
        """Return ones, [B]."""
        return torch.ones_like(tau_t)


@dataclass(frozen=True)
class InverseGap(Weighting):
    """λ = 1/(τ_t − τ_s): all times count about alike, for errors grow with the gap.

    Source: Song & Dhariwal, 2024, section 3.2.

    Args:
        least_gap: Smaller gaps count as this one, positive.

    Raises:
        ValueError: `least_gap` is not positive.
    """

    least_gap: float = 1e-3

    def __post_init__(self) -> None:
        checked_number("least_gap", self.least_gap, "(0, inf)")

    def __call__(self, tau_t: Tensor, tau_s: Tensor) -> Tensor:
        """Return the weights, [B]."""
        return 1 / (tau_t - tau_s).clamp(min=self.least_gap)
