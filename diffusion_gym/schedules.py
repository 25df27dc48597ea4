"""Noise schedules: the process `x_t = α_t·x_0 + σ_t·ε` as functions of the time, which may differ between samples.

`t` is diffusers' own value: the timestep index for discrete variance-preserving (VP) models, σ for flow and
variance-exploding (VE) models. All functions are stateless, work in float64 for float64 times and in float32 for every
other dtype, and return tensors of the shape and on the device of `t`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

TimestepSpacing = Literal["leading", "trailing", "linspace"]
FlowSpacing = Literal["twice_shifted", "full", "even"]


def as_float(values: Tensor) -> Tensor:
    """Return float64 values as they are and all others in float32: the precision of all maths in this package."""
    return values if values.dtype == torch.float64 else values.float()


def checked_num_steps(num_steps: int, *, maximum: int | None = None) -> int:
    """Return a number of steps, which may be NumPy's, as an int.

    Raises:
        ValueError: it is no whole number of at least 1, or above `maximum`.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, Integral):
        raise ValueError(f"num_steps must be a whole number, got {num_steps!r}")
    if num_steps < 1 or (maximum is not None and num_steps > maximum):
        allowed = "at least 1" if maximum is None else f"between 1 and {maximum}"
        raise ValueError(f"num_steps must be {allowed}, got {num_steps!r}")
    return int(num_steps)


class NoiseSchedule(ABC):
    """The signal and noise levels of a diffusion process, and the grid of times on which it is sampled.

    Attributes:
        is_flow: Whether it is a rectified flow: α = 1 − t, σ = t.
        clean: The time of the clean end, where α = 1 and σ = 0. A step to it returns x̂_0 and needs no network call.
        max_time: The largest time of the process (its noisy end).
        min_noise_ratio: The noise ratio below which nothing is left to denoise, unless told otherwise.
        initial_std: The standard deviation of x_T.
    """

    is_flow: ClassVar[bool] = False
    clean: float
    max_time: float
    min_noise_ratio: float = 0.1
    initial_std: float = 1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the signal level α_t of each time, shaped like `t`."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level σ_t of each time, shaped like `t`."""

    @property
    def start_time(self) -> float:
        """The noisiest time whose noise ratio is finite: where a sampler that chooses its own times starts."""
        return self.max_time

    def noise_ratio(self, t: Tensor) -> Tensor:
        """Return the noise ratio τ(t) of each time, which falls from noise to image: σ_t/α_t."""
        return self.sigma(t) / self.alpha(t)

    @abstractmethod
    def time_of(self, noise_ratio: Tensor) -> Tensor:
        """Return the time of each noise ratio, the inverse of `noise_ratio`; the clean end's for 0."""

    def training_times(self, uniform: Tensor, *, within: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Return times for training a denoiser, uniform over the process, from numbers that are uniform in [0, 1).

        Args:
            uniform: The numbers.
            within: The part of the process that the times lie in; 0 is its clean end, 1 its noisy one.
        """
        low, high = within
        return self.clean + (self.max_time - self.clean) * (high - (high - low) * as_float(uniform))

    @abstractmethod
    def timesteps(self, num_steps: int) -> Tensor:
        """Return the `num_steps + 1` times that a sampler visits, from noise to image: float64, on the CPU.

        Raises:
            ValueError: `num_steps` is not positive, or more than the process has steps.
        """


@dataclass(frozen=True, eq=False)
class DiscreteVPSchedule(NoiseSchedule):
    """A discrete variance-preserving process (DDPM, Stable Diffusion 1.x, 2.x, XL): α² + σ² = 1, `t` is an index.

    Between indices log α is linear in t; index −1 is the clean end. In the last interval of a zero-SNR process, where
    log α is −∞, α itself is linear.

    Source: Ho et al., 2020, "Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239.

    Args:
        alphas_cumprod: [T] ᾱ_t = α_t² of index 0 … T−1, decreasing, in [0, 1).
        spacing: The choice of indices for a grid of fewer steps, as diffusers' `timestep_spacing`.
        steps_offset: Added to the indices of the "leading" spacing (1 for Stable Diffusion).
        ends_clean: Whether the grid ends at the clean end (−1) or at index 0, as diffusers' `set_alpha_to_one`. At
            index 0 some noise is left, so the last step stays stochastic and has a density.

    Raises:
        ValueError: `alphas_cumprod` is not a decreasing vector in [0, 1).
    """

    alphas_cumprod: Tensor = field(repr=False)
    spacing: TimestepSpacing = "leading"
    steps_offset: int = 0
    ends_clean: bool = False
    clean: float = field(default=-1.0, init=False)
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self) -> tuple[object, ...]:  # without the tables, which may be on a device that is not there
        return type(self), tuple(getattr(self, part.name) for part in fields(self) if part.init)

    def __post_init__(self) -> None:
        bar = self.alphas_cumprod
        if bar.ndim != 1 or len(bar) < 2 or not bool((bar.diff() < 0).all()) or bar[-1] < 0 or bar[0] >= 1:
            raise ValueError(
                f"alphas_cumprod must be a strictly decreasing vector in [0, 1), got shape {tuple(bar.shape)} "
                f"with first value {bar.flatten()[:1].tolist()} and last {bar.flatten()[-1:].tolist()}"
            )

    @property
    def num_train_timesteps(self) -> int:
        """The number of indices T of the process."""
        return len(self.alphas_cumprod)

    @property
    def max_time(self) -> float:  # type: ignore[override]
        """The noisiest index, T − 1."""
        return float(self.num_train_timesteps - 1)

    @property
    def start_time(self) -> float:
        """The noisiest index with some signal: T − 1, or T − 2 of a zero-SNR process."""
        return self.max_time - float(self.alphas_cumprod[-1] == 0)

    def _log_alpha_table(self, t: Tensor) -> Tensor:
        """Return log α of the indices −1 … T−1 on the device and in the precision of `t`; computed once for each."""
        key = (t.device, t.dtype)
        if key not in self._tables:
            log_alpha = self.alphas_cumprod.cpu().double().log() / 2  # Apple's GPUs have no float64
            self._tables[key] = torch.cat([log_alpha.new_zeros(1), log_alpha]).to(t.device, t.dtype)
        return self._tables[key]

    def _log_alpha(self, t: Tensor) -> Tensor:
        t = as_float(t)
        table = self._log_alpha_table(t)
        position = (t + 1).clamp(0, self.num_train_timesteps)
        lower = position.floor().clamp(max=self.num_train_timesteps - 1).long()
        weight = position - lower
        log_lower, log_upper = table[lower], table[lower + 1]
        interpolated = torch.lerp(log_lower, log_upper, weight)
        return torch.where(log_upper.isinf(), log_lower + torch.log1p(-weight), interpolated)

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    @override
    def time_of(self, noise_ratio: Tensor) -> Tensor:
        ratio = as_float(noise_ratio)
        table = self._log_alpha_table(ratio)
        log_alpha = -torch.log1p(ratio.square()) / 2
        # log α falls from index −1 to T−1 and searchsorted wants rising values: hence the signs.
        lower = torch.searchsorted(-table, -log_alpha).sub(1).clamp(0, self.num_train_timesteps - 1)
        log_lower, log_upper = table[lower], table[lower + 1]
        inside = (log_alpha - log_lower) / (log_upper - log_lower)
        weight = torch.where(log_upper.isinf(), -torch.expm1(log_alpha - log_lower), inside)
        return lower - 1 + weight.clamp(0, 1)

    def training_times(self, uniform: Tensor, *, within: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Return indices 0 … T−1, each as probable as any other, from numbers that are uniform in [0, 1)."""
        low, high = within
        total = self.num_train_timesteps
        return ((low + (high - low) * as_float(uniform)) * total).floor().clamp(max=total - 1)  # it may round to total

    @override
    def timesteps(self, num_steps: int) -> Tensor:
        total = self.num_train_timesteps
        num_steps = checked_num_steps(num_steps, maximum=total)
        if self.spacing == "leading":
            grid = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64) * (total // num_steps) + self.steps_offset
        elif self.spacing == "trailing":
            grid = torch.arange(num_steps, 0, -1, dtype=torch.float64).mul(total / num_steps).round() - 1
        else:
            grid = torch.linspace(0, total - 1, num_steps, dtype=torch.float64).round().flip(0)
        if grid[0] > total - 1:
            raise ValueError(f"num_steps={num_steps} with steps_offset={self.steps_offset} starts beyond {total - 1}")
        end = self.clean if self.ends_clean else 0.0
        return torch.cat([grid, grid.new_tensor([end])])


@dataclass(frozen=True, eq=False)
class LatentConsistencySchedule(DiscreteVPSchedule):
    """The process of a latent consistency model: a grid is made of the K times at which it was distilled.

    These are k·⌊T/K⌋ − 1, k = 1 … K. A grid of n steps visits those of k = K − ⌊i·K/n⌋, i = 0 … n−1, and then the clean
    end (−1), as diffusers' `LCMScheduler`.

    Source: Luo et al., 2023, "Latent Consistency Models", section 4.3, https://arxiv.org/abs/2310.04378.

    Args:
        alphas_cumprod: [T] ᾱ_t, as of `DiscreteVPSchedule`.
        original_steps: K, diffusers' `original_inference_steps`: the most steps of a grid.

    Raises:
        ValueError: `alphas_cumprod` is not a decreasing vector in [0, 1), or K is not between 1 and T.
    """

    spacing: TimestepSpacing = field(default="leading", init=False, repr=False)
    steps_offset: int = field(default=0, init=False, repr=False)
    ends_clean: bool = field(default=True, init=False, repr=False)
    original_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.original_steps <= self.num_train_timesteps:
            raise ValueError(
                f"original_steps must be between 1 and {self.num_train_timesteps}, got {self.original_steps!r}"
            )

    @override
    def timesteps(self, num_steps: int) -> Tensor:
        num_steps = checked_num_steps(num_steps, maximum=self.original_steps)
        skipped = torch.arange(num_steps, dtype=torch.float64).mul(self.original_steps / num_steps).floor()
        stride = self.num_train_timesteps // self.original_steps
        return torch.cat([(self.original_steps - skipped) * stride - 1, skipped.new_tensor([self.clean])])


@dataclass(frozen=True, eq=False)
class FlowSchedule(NoiseSchedule):
    """A rectified flow (Stable Diffusion 3, Flux): α = 1 − t, σ = t, with `t` in [0, 1].

    Source: Liu et al., 2022, "Flow Straight and Fast", https://arxiv.org/abs/2209.03003; the time shift is eq. 23 of
    Esser et al., 2024, https://arxiv.org/abs/2403.03206.

    Args:
        shift: The sampling grid's shift, t → shift·t / (1 + (shift − 1)·t), positive; 3 for Stable Diffusion 3.
        num_train_timesteps: The grid's finest resolution.
        spacing: The last noisy time before the shift; all times before it are evenly spaced from 1.
            "twice_shifted": the shifted 1/num_train_timesteps, as diffusers' `FlowMatchEulerDiscreteScheduler` has it.
            "full": 1/num_train_timesteps, as that scheduler with a shift that depends on the image's size.
            "even": 1/num_steps, as diffusers' Flux pipeline.

    Raises:
        ValueError: `shift` is not positive, or `spacing` none of these.
    """

    is_flow: ClassVar[bool] = True
    shift: float = 1.0
    num_train_timesteps: int = 1000
    spacing: FlowSpacing = "twice_shifted"
    clean: float = field(default=0.0, init=False)
    max_time: float = field(default=1.0, init=False)
    min_noise_ratio: float = field(default=0.01, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be a finite number above 0, got {self.shift!r}")
        if self.spacing not in get_args(FlowSpacing):
            raise ValueError(f"spacing must be one of {get_args(FlowSpacing)}, got {self.spacing!r}")

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return 1 - as_float(t)

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return as_float(t).clone()

    def noise_ratio(self, t: Tensor) -> Tensor:
        """Return σ_t = t itself, as TPDM (Ye et al., 2024) does: σ/α would be infinite at the noisy end."""
        return self.sigma(t)

    @override
    def time_of(self, noise_ratio: Tensor) -> Tensor:
        return as_float(noise_ratio).clone()

    @override
    def timesteps(self, num_steps: int) -> Tensor:
        num_steps = checked_num_steps(num_steps)
        last = torch.tensor(
            1 / (num_steps if self.spacing == "even" else self.num_train_timesteps), dtype=torch.float64
        )
        if self.spacing == "twice_shifted":
            last = self._shifted(last)
        grid = self._shifted(torch.linspace(1.0, float(last), num_steps, dtype=torch.float64))
        return torch.cat([grid, grid.new_zeros(1)])

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (self.shift * t + (1 - t))  # exactly 1 at 1


@dataclass(frozen=True, eq=False)
class KarrasSchedule(NoiseSchedule):
    """A variance-exploding process on Karras' grid: α = 1, σ = t.

    σ_i = (σ_max^(1/ρ) + i/(n−1)·(σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ, i = 0 … n−1, then 0.

    Source: Karras et al., 2022, eq. 5, https://arxiv.org/abs/2206.00364.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    clean: float = field(default=0.0, init=False)

    @property
    def max_time(self) -> float:  # type: ignore[override]
        """The largest noise level, σ_max."""
        return self.sigma_max

    @property
    def initial_std(self) -> float:  # type: ignore[override]
        """The standard deviation of x_T = x_0 + σ_max·ε: σ_max, beside which x_0 does not count."""
        return self.sigma_max

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(as_float(t))

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return as_float(t).clone()

    @override
    def time_of(self, noise_ratio: Tensor) -> Tensor:
        return as_float(noise_ratio).clone()

    @override
    def timesteps(self, num_steps: int) -> Tensor:
        num_steps = checked_num_steps(num_steps)
        inverse = 1 / self.rho
        ramp = torch.linspace(self.sigma_max**inverse, self.sigma_min**inverse, num_steps, dtype=torch.float64)
        return torch.cat([ramp**self.rho, ramp.new_zeros(1)])


@dataclass(frozen=True, eq=False)
class ConsistencySchedule(KarrasSchedule):
    """The process of consistency models: Karras', begun at ε = σ_min, where trajectories end: α = 1, σ = √(t² − ε²).

    A grid of n steps visits Karras' level i·⌊N/n⌋ of N, i = 0 … n−1, and then ε, as diffusers'
    `CMStochasticIterativeScheduler`.

    Source: Song et al., 2023, algorithm 1, https://arxiv.org/abs/2303.01469.

    Args:
        sigma_min: ε, the clean end.
        sigma_max: The noisy end.
        rho: Karras' ρ.
        num_train_timesteps: N, the number of levels.

    Raises:
        ValueError: N is below 2.
    """

    num_train_timesteps: int = 40

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps must be at least 2, got {self.num_train_timesteps!r}")
        object.__setattr__(self, "clean", self.sigma_min)

    @override
    def sigma(self, t: Tensor) -> Tensor:
        t = as_float(t)
        sigma_min = torch.tensor(self.sigma_min, dtype=t.dtype, device=t.device)  # exactly 0 at the clean end
        return ((t - sigma_min).clamp(min=0) * (t + sigma_min)).sqrt()

    def noise_ratio(self, t: Tensor) -> Tensor:
        """Return t itself, which is ε at the clean end: distances between levels are those of t."""
        return as_float(t).clone()

    @override
    def timesteps(self, num_steps: int) -> Tensor:
        num_steps = checked_num_steps(num_steps, maximum=self.num_train_timesteps - 1)
        inverse = 1 / self.rho
        index = torch.arange(num_steps, dtype=torch.float64) * (self.num_train_timesteps // num_steps)
        high, low = self.sigma_max**inverse, self.sigma_min**inverse
        levels = (high + index / (self.num_train_timesteps - 1) * (low - high)) ** self.rho
        return torch.cat([levels, levels.new_tensor([self.sigma_min])])
