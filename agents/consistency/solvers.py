"""Steps of the probability-flow ODE, by which a teacher leads from one time to the next cleaner one."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_gym.parts import Part
from diffusion_gym.predictions import broadcast_to
from diffusion_gym.schedules import NoiseSchedule

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A function of x_t [B, ...] and t [B] that returns x̂_0 and ε̂."""


class Solver(Part, ABC):
    """A step of the ODE; with y = x/α over the noise ratio τ = σ/α it is dy/dτ = ε̂ for every process."""

    @abstractmethod
    def step(self, predict: Predict, x: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return x_s, [B, ...].

        Args:
            predict: The teacher.
            x: [B, ...] x_t.
            t: [B] the times.
            s: [B] the next, cleaner times.
            schedule: The teacher's process.
        """


@dataclass(frozen=True)
class Euler(Solver):
    """Euler's step in y, of first order, one prediction: it is DDIM's with η = 0.

        x_s = α_s·x̂_0 + σ_s·ε̂

    Over many of the process's indices at once (see `EveryIndex`) it is the skipping step of latent consistency models.

    Source: Song et al., 2020, https://arxiv.org/abs/2010.02502.
    """

    def step(self, predict: Predict, x: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return x_s, [B, ...]; the arguments are those of `Solver.step`."""
        x0, epsilon = predict(x, t)
        return broadcast_to(schedule.alpha(s), x) * x0 + broadcast_to(schedule.sigma(s), x) * epsilon


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's step in y, of second order, two predictions; to the clean end, where ε̂ is not defined, Euler's.

        y' = y + (τ_s − τ_t)·ε̂(y, τ_t)    y_s = y + (τ_s − τ_t)·(ε̂(y, τ_t) + ε̂(y', τ_s))/2

    Source: Karras et al., 2022, algorithm 1, https://arxiv.org/abs/2206.00364; consistency models' choice.
    """

    def step(self, predict: Predict, x: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return x_s, [B, ...]; the arguments are those of `Solver.step`."""
        alpha_t, sigma_t, alpha_s, sigma_s = (
            broadcast_to(level(time), x) for time in (t, s) for level in (schedule.alpha, schedule.sigma)
        )
        x0, epsilon = predict(x, t)
        euler = alpha_s * x0 + sigma_s * epsilon
        is_clean = sigma_s == 0
        _, corrected = predict(euler, torch.where(is_clean.flatten(), t, s))
        mean = torch.where(is_clean, epsilon, (epsilon + corrected) / 2)
        return alpha_s * (x / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * mean)
