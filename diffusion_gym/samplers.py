"""Samplers: how a step from t to a cleaner s divides its noise between the predicted and a fresh one.

Each is a part that answers with the scales of its steps, and that never asks what the model was (see
`diffusion_gym.transitions`).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import checked_number
from .parts import Part
from .schedules import NoiseSchedule, as_float


@dataclass(frozen=True, eq=False)
class Scales:
    """The factors of a step: x_s = x0·x̂_0 + epsilon·ε̂ + std·z, with z of unit variance.

    Args:
        x0: [B] the factor of the predicted clean latents.
        epsilon: [B] the factor of the predicted noise.
        std: [B] the factor of the fresh noise, at least 0.
        deterministic: The whole batch is known, without looking at `std`, to have std 0.
    """

    x0: Tensor
    epsilon: Tensor
    std: Tensor
    deterministic: bool = False


class Sampler(Part, ABC):
    """A rule for drawing the next latents from a prediction: a frozen dataclass without state."""

    @abstractmethod
    def scales(self, schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Scales:
        """Return the scales of the steps from t to s, for each sample its own.

        Args:
            schedule: The process that t and s belong to.
            t: [B] the current times.
            s: [B] the next, cleaner times.

        Raises:
            ValueError: the sampler is not one of this process.
        """


@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM with a share of DDPM's noise, for VP, flow and VE alike.

    Source: Song et al., 2020, eq. 12 and 16, https://arxiv.org/abs/2010.02502.

    Args:
        eta: η in [0, 1]. 0 is the deterministic step (Euler's on a flow), 1 DDPM's ancestral sampling.

    Raises:
        ValueError: `eta` is no number in [0, 1].
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", checked_number("eta", self.eta, "[0, 1]"))

    def scales(self, schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Scales:
        """x0 = α_s,  epsilon = σ_s·√(1 − η² + η²q²),  std = η·σ_s·√(1 − q²),  with q = α_t·σ_s / (α_s·σ_t)."""
        alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
        alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
        q = alpha_t * sigma_s / (alpha_s * sigma_t)
        eta = torch.full_like(as_float(t), self.eta)  # a float's square would be rounded after it, not before
        std = eta * sigma_s * torch.sqrt((1 - q**2).clamp(min=0))
        return Scales(alpha_s, sigma_s * torch.sqrt(1 - eta**2 + eta**2 * q**2), std, deterministic=self.eta == 0)


@dataclass(frozen=True)
class Consistency(Sampler):
    """The multistep step of consistency models and LCM: all noise is drawn anew.

    Source: Song et al., 2023, algorithm 1, https://arxiv.org/abs/2303.01469; Luo et al., 2023 (LCM),
    https://arxiv.org/abs/2310.04378.
    """

    def scales(self, schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Scales:
        """x0 = α_s,  epsilon = 0,  std = σ_s."""
        sigma_s = schedule.sigma(s)
        return Scales(schedule.alpha(s), torch.zeros_like(sigma_s), sigma_s)


@dataclass(frozen=True)
class CPS(Sampler):
    """Coefficients-preserving sampling: a share of the noise is drawn anew in every step.

    Source: Wang & Yu, 2025, "Coefficients-Preserving Sampling", https://arxiv.org/abs/2509.05952.

    Args:
        nu: ν in [0, 1], the share of fresh noise; 0 is deterministic.

    Raises:
        ValueError: `nu` is no number in [0, 1].
    """

    nu: float = 0.7

    def __post_init__(self) -> None:
        object.__setattr__(self, "nu", checked_number("nu", self.nu, "[0, 1]"))

    def scales(self, schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Scales:
        """x0 = α_s,  epsilon = σ_s·cos(νπ/2),  std = σ_s·sin(νπ/2)."""
        sigma_s, angle = schedule.sigma(s), self.nu * math.pi / 2
        return Scales(schedule.alpha(s), sigma_s * math.cos(angle), sigma_s * math.sin(angle), self.nu == 0)


@dataclass(frozen=True)
class FlowSDE(Sampler):
    """Flow-GRPO's Euler–Maruyama step of the SDE that has a rectified flow's marginals.

    Source: Liu et al., 2025, "Flow-GRPO", https://arxiv.org/abs/2505.05470.

    Note:
        At t = 1, the pole of w, the code of Flow-GRPO takes s for the t in 1 − t, and so does this.

        Steps leave more noise than the process has, epsilon² + std² = s² + w²·(t − s)²·(1/t + w²/(4t²)), which is
        little where they are fine. So std may be above s: the step to the clean end is noisy too, and has a density.

    Args:
        a: The level of the noise, at least 0; 0 is deterministic.

    Raises:
        ValueError: `a` is no number of at least 0.
    """

    a: float = 0.7

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", checked_number("a", self.a, "[0, inf)"))

    def scales(self, schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Scales:
        """x0 = 1 − s,  epsilon = s − w²·(t − s)/(2t),  std = w·√(t − s),  with w² = a²·t/(1 − t)."""
        if not schedule.is_flow:
            raise ValueError(
                f"FlowSDE is a sampler of rectified flows, got a {type(schedule).__name__}: "
                "DDIM, CPS and Consistency sample every process"
            )
        t, s = as_float(t), as_float(s)
        rate = self.a**2 / (1 - torch.where(t == 1, s, t))  # w²/t
        step = t - s
        return Scales(1 - s, s - rate * step / 2, torch.sqrt(rate * t * step), deterministic=self.a == 0)


@dataclass(frozen=True)
class Windowed(Sampler):
    """Another sampler inside a window of times, and the deterministic step, DDIM(0), outside it.

    Source: Li et al., 2025, "MixGRPO", https://arxiv.org/abs/2507.21802.

    Args:
        sampler: The other sampler.
        noisy: The noisiest time from which a step is in the window.
        clean: The end of the window: steps from this time and from cleaner ones are outside.

    Raises:
        TypeError, ValueError: `sampler` is no sampler, or the times are no numbers.
    """

    sampler: Sampler
    noisy: float
    clean: float

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Sampler):
            raise TypeError(f"sampler must be a Sampler, such as DDIM(eta=1.0); got {self.sampler!r}")
        for name in ("noisy", "clean"):
            object.__setattr__(self, name, checked_number(name, getattr(self, name)))

    def scales(self, schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Scales:
        """The other sampler's scales where clean < t ≤ noisy, to the last bit; elsewhere α_s, σ_s and 0."""
        inside, outside = self.sampler.scales(schedule, t, s), DDIM(0.0).scales(schedule, t, s)
        is_inside = (t <= self.noisy) & (t > self.clean)
        x0, epsilon, std = (
            torch.where(is_inside, getattr(inside, name), getattr(outside, name)) for name in ("x0", "epsilon", "std")
        )
        return Scales(x0, epsilon, std, inside.deterministic)
