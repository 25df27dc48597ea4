"""The pairs of times at which a consistency function has to agree: t, and a cleaner s.

All of them are made of noise ratios τ = σ/α, which mean the same for every process.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from diffusion_gym.checks import checked_integer, checked_number
from diffusion_gym.parts import Part
from diffusion_gym.schedules import NoiseSchedule


class TimeSampling(Part, ABC):
    """How often each time is drawn."""

    @abstractmethod
    def intervals(self, levels: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return indices n of intervals (τ_n, τ_{n+1}), [count] in 0 … N−2, of rising noise ratios [N]."""

    @abstractmethod
    def ratios(self, low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
        """Return noise ratios between two, [count] float64."""


@dataclass(frozen=True)
class UniformTimes(TimeSampling):
    """Every interval as often as any other; without intervals, ln τ is uniform."""

    def intervals(self, levels: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return indices, [count]."""
        return torch.randint(0, len(levels) - 1, (count,), generator=generator)

    def ratios(self, low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
        """Return noise ratios, [count]."""
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        return low * (high / low) ** uniform


@dataclass(frozen=True)
class LogNormalTimes(TimeSampling):
    """ln τ ~ N(mean, std²), cut off where there are no times.

    The defaults hardly draw the noisiest times: with `mean=0.5, std=2.5` they are drawn oftener.

    Source: Song & Dhariwal, 2024, section 3.5 (iCT), https://arxiv.org/abs/2310.14189.

    Args:
        mean: P_mean.
        std: P_std, positive.

    Raises:
        ValueError: they are no numbers, or `std` is not positive.
    """

    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        checked_number("mean", self.mean)
        checked_number("std", self.std, "(0, inf)")

    def intervals(self, levels: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return indices, [count]: P(n) ∝ erf((ln τ_{n+1} − mean)/(√2·std)) − erf((ln τ_n − mean)/(√2·std))."""
        below = torch.erf((levels.double().log() - self.mean) / (math.sqrt(2) * self.std))
        return torch.multinomial(below.diff().clamp(min=0), count, replacement=True, generator=generator)

    def ratios(self, low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
        """Return noise ratios, [count]."""
        normal = torch.randn(count, generator=generator, dtype=torch.float64)
        return (self.mean + self.std * normal).exp().clamp(low, high)


class Discretisation(Part, ABC):
    """The pairs (t, s) of times that a consistency function is trained on, which may change as the training goes on."""

    @abstractmethod
    def pairs(
        self, schedule: NoiseSchedule, boundary: float, *, progress: float, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the times t and s < t, [count] float32 each, on the CPU.

        Args:
            schedule: The process.
            boundary: The cleanest time, where f(x, t) = x.
            progress: The share of the training that is over, in [0, 1).
            count: The number of pairs.
            generator: The randomness.
        """

    def num_intervals(self, progress: float) -> int | None:
        """Return N, the number of intervals that the process is divided into; None: it depends on the process."""
        return None


class Levels(Discretisation):
    """Neighbours out of a row of times t_1 = boundary < … < t_N."""

    times: TimeSampling

    @abstractmethod
    def levels(self, schedule: NoiseSchedule, boundary: float, progress: float) -> Tensor:
        """Return the times, [N] float64, rising from the boundary."""

    @override
    def pairs(
        self, schedule: NoiseSchedule, boundary: float, *, progress: float, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        levels = self.levels(schedule, boundary, progress)
        index = self.times.intervals(schedule.noise_ratio(levels), count, generator)
        return levels[index + 1].float(), levels[index].float()


def karras_levels(schedule: NoiseSchedule, boundary: float, num_levels: int, rho: float = 7.0) -> Tensor:
    """Return N times, float64, rising from the boundary to the noisiest, evenly spaced in τ^(1/ρ).

    Source: Karras et al., 2022, eq. 5, https://arxiv.org/abs/2206.00364.
    """
    ends = torch.tensor([boundary, schedule.start_time], dtype=torch.float64)
    low, high = (float(ratio) ** (1 / rho) for ratio in schedule.noise_ratio(ends))
    levels = schedule.time_of(torch.linspace(low, high, num_levels, dtype=torch.float64) ** rho)
    levels[0], levels[-1] = ends
    return levels


@dataclass(frozen=True)
class KarrasLevels(Levels):
    """N times, evenly spaced in τ^(1/ρ), as consistency distillation has them.

    Few levels are learnt sooner, for the boundary's truth has fewer steps to go; many leave a smaller error of the
    solver.

    Source: Song et al., 2023, section 3 and appendix C (N = 18 for CIFAR-10, 40 for ImageNet and LSUN).

    Args:
        num_levels: N, at least 2.
        rho: ρ.
        times: How often each is drawn.
    """

    num_levels: int = 18
    rho: float = 7.0
    times: TimeSampling = UniformTimes()

    def __post_init__(self) -> None:
        checked_integer("num_levels", self.num_levels, at_least=2)
        checked_number("rho", self.rho, "(0, inf)")

    def levels(self, schedule: NoiseSchedule, boundary: float, progress: float) -> Tensor:
        """Return the times, [N]."""
        return karras_levels(schedule, boundary, self.num_levels, self.rho)

    def num_intervals(self, progress: float) -> int | None:
        """Return N − 1."""
        return self.num_levels - 1


@dataclass(frozen=True)
class EveryIndex(Levels):
    """Every `skip`-th index of a discrete process, from its noisiest down, and the boundary: LCM's skipping steps.

    Source: Luo et al., 2023, section 4.3, https://arxiv.org/abs/2310.04378 (k = 20 of 1,000).

    Args:
        skip: k, at least 1.
        times: How often each is drawn.
    """

    skip: int = 20
    times: TimeSampling = UniformTimes()

    def __post_init__(self) -> None:
        checked_integer("skip", self.skip, at_least=1)

    def levels(self, schedule: NoiseSchedule, boundary: float, progress: float) -> Tensor:
        """Return the times, [N].

        Raises:
            ValueError: the process has no indices, or no more than `skip`.
        """
        if schedule.clean != -1 or schedule.max_time <= self.skip:
            raise ValueError(
                f"EveryIndex(skip={self.skip}) needs a discrete process of more indices than that; the last time here "
                f"is {schedule.max_time:g}: KarrasLevels divides every process"
            )
        falling = torch.arange(schedule.max_time, boundary, -self.skip, dtype=torch.float64)
        return torch.cat([falling, torch.tensor([boundary], dtype=torch.float64)]).flip(0)


@dataclass(frozen=True)
class GrowingLevels(Levels):
    """Levels whose number grows as the published consistency training has it.

        N(k) = ⌈√(k/K·((s_1 + 1)² − s_0²) + s_0²) − 1⌉ + 1

    Source: Song et al., 2023, appendix C.

    Args:
        first: s_0.
        last: s_1.
        times: How often each is drawn.
    """

    first: int = 2
    last: int = 150
    times: TimeSampling = UniformTimes()

    def __post_init__(self) -> None:
        checked_integer("first", self.first, at_least=1)
        checked_integer("last", self.last, at_least=self.first)

    def num_levels(self, progress: float) -> int:
        """Return N(k), at least 2."""
        grown = progress * ((self.last + 1) ** 2 - self.first**2) + self.first**2
        return max(2, math.ceil(math.sqrt(grown) - 1) + 1)

    def num_intervals(self, progress: float) -> int | None:
        """Return N(k), by which the paper's formula of the target's decay divides."""
        return self.num_levels(progress)

    def levels(self, schedule: NoiseSchedule, boundary: float, progress: float) -> Tensor:
        """Return the times, [N(k)]."""
        return karras_levels(schedule, boundary, self.num_levels(progress))


@dataclass(frozen=True)
class DoublingLevels(Levels):
    """Levels whose number doubles in equal stages.

        N(k) = min(s_0·2^⌊k/K'⌋, s_1) + 1,  K' = ⌊K/(log₂⌊s_1/s_0⌋ + 1)⌋

    Source: Song & Dhariwal, 2024, section 3.4 (iCT), https://arxiv.org/abs/2310.14189.

    Args:
        first: s_0.
        last: s_1.
        times: How often each is drawn.
    """

    first: int = 10
    last: int = 1280
    times: TimeSampling = LogNormalTimes()

    def __post_init__(self) -> None:
        checked_integer("first", self.first, at_least=1)
        checked_integer("last", self.last, at_least=self.first)

    def num_levels(self, progress: float) -> int:
        """Return N(k)."""
        num_stages = math.log2(self.last // self.first) + 1
        return int(min(self.first * 2 ** math.floor(progress * num_stages), self.last)) + 1

    def num_intervals(self, progress: float) -> int | None:
        """Return N(k) − 1."""
        return self.num_levels(progress) - 1

    def levels(self, schedule: NoiseSchedule, boundary: float, progress: float) -> Tensor:
        """Return the times, [N(k)]."""
        return karras_levels(schedule, boundary, self.num_levels(progress))


@dataclass(frozen=True)
class ShrinkingGap(Discretisation):
    """Any time and one nearer and nearer to it, without levels.

        τ_s = τ_t·(1 − n(τ_t)/q^a),  n(τ) = 1 + k·sigmoid(−b·τ),  a = 1 … `stages` in equal shares

    In the first stage s is the boundary for small τ, which is a diffusion model's objective.

    Source: Geng et al., 2024, "Consistency Models Made Easy" (ECT), https://arxiv.org/abs/2406.14548.

    Args:
        base: q, above 1.
        stages: The number of stages.
        k: How much wider the gap is for small τ.
        b: How fast that ends.
        times: How often each t is drawn.
    """

    base: float = 2.0
    stages: int = 8
    k: float = 8.0
    b: float = 1.0
    times: TimeSampling = LogNormalTimes()

    def __post_init__(self) -> None:
        checked_number("base", self.base, "(1, inf)")
        checked_integer("stages", self.stages, at_least=1)
        checked_number("k", self.k, "[0, inf)")
        checked_number("b", self.b, "[0, inf)")

    @override
    def pairs(
        self, schedule: NoiseSchedule, boundary: float, *, progress: float, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([boundary, schedule.start_time], dtype=torch.float64)
        low, high = schedule.noise_ratio(ends).tolist()
        tau = self.times.ratios(low * (1 + 1e-3), high, count, generator)
        stage = math.floor(progress * self.stages) + 1
        wider = 1 + self.k * torch.sigmoid(-self.b * tau)
        nearer = (tau * (1 - wider / self.base**stage)).clamp(min=low)
        t, s = schedule.time_of(tau), schedule.time_of(nearer)
        return t.float(), torch.where(nearer <= low, ends[0], s).float()
