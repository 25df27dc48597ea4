"""Fixed grids of times for samplers that need not keep to a checkpoint's own grid: the baselines of learned ones.

Each returns `num_steps + 1` times from the schedule's noisy start to its clean end: float64, on the CPU. All of them
spend `num_steps` network calls, the step to the clean end being one of them. `grid_through` makes one of any times.

A step can also be written as the ratio r of the noise ratios after and before it, whatever the process: time prediction
does so.
"""

from collections.abc import Sequence
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

from .checks import checked_integer
from .schedules import NoiseSchedule, checked_num_steps

# A step's ratio of noise ratios is kept within these, so that its density is finite.
MIN_RATIO = 1e-3
MAX_RATIO = 1 - 1e-3


def _fractions(num_steps: int) -> Tensor:
    """Return 1, …, 0 in `num_steps` equal steps."""
    return torch.linspace(1, 0, checked_num_steps(num_steps) + 1, dtype=torch.float64)


def _between_start_and_end(schedule: NoiseSchedule, fractions: Tensor) -> Tensor:
    return schedule.clean + (schedule.start_time - schedule.clean) * fractions


def uniform_grid(schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Return times at equal distances."""
    return _between_start_and_end(schedule, _fractions(num_steps))


def power_grid(schedule: NoiseSchedule, num_steps: int, *, rho: float) -> Tensor:
    """Return times u^ρ for equally spaced u: dense at the noisy end for ρ < 1, at the clean end for ρ > 1."""
    return _between_start_and_end(schedule, _fractions(num_steps) ** rho)


def shifted_grid(schedule: NoiseSchedule, num_steps: int, *, shift: float = 3.0) -> Tensor:
    """Return Stable Diffusion 3's grid, u → shift·u / (1 + (shift − 1)·u): dense at the noisy end for shift > 1.

    Source: Esser et al., 2024, eq. 23, https://arxiv.org/abs/2403.03206.
    """
    u = _fractions(num_steps)
    return _between_start_and_end(schedule, shift * u / (1 + (shift - 1) * u))


def karras_grid(schedule: NoiseSchedule, num_steps: int, *, rho: float = 7.0) -> Tensor:
    """Return times whose noise ratios are τ_i = (τ_max^(1/ρ) + i/(n−1)·(τ_min^(1/ρ) − τ_max^(1/ρ)))^ρ, then the end.

    Source: Karras et al., 2022, eq. 5, https://arxiv.org/abs/2206.00364.
    """
    largest = schedule.noise_ratio(torch.tensor([schedule.start_time], dtype=torch.float64))
    if checked_num_steps(num_steps) == 1:
        return torch.tensor([schedule.start_time, schedule.clean], dtype=torch.float64)
    high, low = largest ** (1 / rho), schedule.min_noise_ratio ** (1 / rho)
    ratios = (low + (high - low) * _fractions(num_steps - 1)) ** rho
    times = schedule.time_of(ratios)
    times[0] = schedule.start_time
    return torch.cat([times, times.new_tensor([schedule.clean])])


def grid_through(schedule: NoiseSchedule, times: Sequence[float]) -> Tensor:
    """Return the grid of a sampler that asks the network at these times: they, and the end of the model's own grids.

    Args:
        schedule: The process.
        times: Falling times, at least one, such as (801, 401).

    Raises:
        TypeError: they are no sequence of numbers.
        ValueError: there is none, they do not fall, or one lies outside the process.
    """
    is_sequence = isinstance(times, Sequence) and not isinstance(times, str)
    if not is_sequence or any(isinstance(time, bool) or not isinstance(time, Real) for time in times):
        raise TypeError(f"times must be a sequence of numbers, such as (801, 401); got {times!r}")
    grid = torch.tensor([*times, float(schedule.timesteps(1)[-1])], dtype=torch.float64)
    falls = all(later < earlier for earlier, later in pairwise(grid.tolist()))
    if not times or not falls or not grid[0] <= schedule.max_time:
        raise ValueError(
            f"times must fall from at most {schedule.max_time:g}, all of them above {float(grid[-1]):g}, where the "
            f"model's grids end; got {tuple(times)!r}"
        )
    return grid


def chosen_grid(
    schedule: NoiseSchedule, *, num_steps: int | None, times: Sequence[float] | None, default_steps: int
) -> Tensor:
    """Return the grid through these times, or the model's own grid of so many steps.

    Args:
        schedule: The process.
        num_steps: The number of steps; None: as many as there are times, or the default.
        times: The times; None: the model's own.
        default_steps: The number of steps where neither says it.

    Raises:
        TypeError, ValueError: they are none of the process's, or differ in number.
    """
    if num_steps is not None:
        num_steps = checked_integer("num_steps", num_steps, at_least=1)
    if times is None:
        return schedule.timesteps(default_steps if num_steps is None else num_steps)
    grid = grid_through(schedule, times)
    if num_steps not in (None, len(times)):
        raise ValueError(f"num_steps={num_steps} differs from the {len(times)} times: leave one of them out")
    return grid


def step_ratios(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """Return the ratios r = τ(s)/τ(t) of a grid's steps, [num_steps] float64, within [MIN_RATIO, MAX_RATIO]."""
    tau = schedule.noise_ratio(times.cpu().double())
    return (tau[1:] / tau[:-1]).clamp(MIN_RATIO, MAX_RATIO)
