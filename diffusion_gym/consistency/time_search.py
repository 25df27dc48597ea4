"""The search of the times at which a few-step sampler asks the network, by any metric of its images.

Greedy: one time after the other is inserted where it helps most, each found by a ternary search, which takes it that
the metric falls to its minimum and then rises. That is checked on every time that was tried, and said.

All candidates begin with the same noises and draw the same, so that they differ by their times alone. What the network
predicts after the first times of a grid is kept for all grids that begin with them: to try another last time costs one
pass.

Source: Song et al., 2023, "Consistency Models", section 4 and appendix, https://arxiv.org/abs/2303.01469.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..checks import checked_integer
from ..grids import grid_through
from ..models.base import Conditioning, DiffusionModel, Prediction
from ..predictions import broadcast_to
from ..samplers import Sampler
from ..transitions import draw_noise, transition

Times = tuple[float, ...]


@dataclass(frozen=True)
class Search:
    """What a search of times has found.

    Args:
        times: The times, for `times=…`.
        value: The metric's value of their images.
        tried: The value of every grid that was tried, by its times.
        bump: How far the metric rises and falls again between tried times of one insertion, at the most; 0: it falls
            and then rises wherever it was tried, as the search takes it to.
        passes: How often the network was asked, counted in images.
    """

    times: Times
    value: float
    tried: dict[Times, float]
    bump: float
    passes: int

    @property
    def is_unimodal(self) -> bool:
        """Whether nothing that was tried contradicts the search."""
        return self.bump == 0


def bump_of(values: Sequence[float]) -> float:
    """Return how far a sequence is from falling and then rising.

    max_j [v_j − max(min_{i<j} v_i, min_{k>j} v_k)], or 0
    """
    bumps = (values[j] - max(min(values[:j]), min(values[j + 1 :])) for j in range(1, len(values) - 1))
    return max([0.0, *bumps])


def ternary_minimum(function: Callable[[int], float], size: int) -> int:
    """Return where a function of 0 … size − 1 is least, if it falls and then rises; by about 5·ln(size) values."""
    low, high = 0, size - 1
    while high - low >= 3:
        third = (high - low) // 3
        if function(low + third) < function(high - third):
            high -= third
        else:
            low += third
    return min(range(low, high + 1), key=function)


@torch.no_grad()
def search_times(
    model: DiffusionModel,
    noise: Tensor,
    conditioning: Conditioning,
    metric: Callable[[Tensor], float],
    *,
    num_steps: int,
    candidates: Sequence[float],
    num_checks: int = 3,
    sampler: Sampler | None = None,
    guidance_scale: float | None = None,
    denoiser: nn.Module | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Search:
    """Return the times of a few-step sampler whose images have the least metric, as far as a greedy search finds them.

    It begins with the first candidate alone and inserts one of the others at a time, on either side of those that are
    there: between each two of them, and after the last, the best is searched for, and the best of these is taken.

    Args:
        model: The diffusion model, usually a consistency model.
        noise: [B, C, H, W] x_T of all grids.
        conditioning: What `model.encode_prompts` returns, [B, ...] each.
        metric: What is to be small, as a function of the images [B, 3, H, W] in [0, 1]: a distance to real images,
            a reward with the sign changed.
        num_steps: The number of times.
        candidates: The times to choose from, falling, such as `model.schedule.timesteps(16)[:-1].tolist()`; the first
            is where every grid begins.
        num_checks: Times, evenly over each place of insertion, that are tried beside those of the ternary search, which
            take part; they find where the metric has more than one minimum.
        sampler: How steps are drawn; None: the model's default.
        guidance_scale: Guidance; None: the model's default.
        denoiser: The network to ask; None: the model's own.
        batch_size: Images in one pass.
        seed: Seeds the noise of the steps: image i has that of seed + i.

    Raises:
        TypeError, ValueError: the candidates are no falling times of the process, or fewer than `num_steps`; or the
            metric is not finite.
    """
    num_steps = checked_integer("num_steps", num_steps, at_least=1)
    num_checks = checked_integer("num_checks", num_checks, at_least=0)
    grid_through(model.schedule, candidates)
    if len(candidates) < num_steps:
        raise ValueError(f"num_steps={num_steps} times cannot be chosen from {len(candidates)} candidates")
    paths = _Paths(
        model,
        noise,
        conditioning,
        model.default_sampler if sampler is None else sampler,
        scale=model.guidance_scale_of(guidance_scale),
        denoiser=denoiser,
        batch_size=checked_integer("batch_size", batch_size, at_least=1),
        num_steps=num_steps,
        seed=seed,
    )
    tried: dict[Times, float] = {}

    def value(times: Times) -> float:
        if times not in tried:
            tried[times] = float(metric(model.decode(paths.x0(times))))
            if not math.isfinite(tried[times]):
                raise ValueError(f"the metric must be finite, got {tried[times]} for the times {times}")
        return tried[times]

    times: Times = (float(candidates[0]),)
    bump = 0.0
    value(times)
    for _ in range(num_steps - 1):
        found = []
        for place, (before, after) in enumerate(pairwise([*times, -float("inf")]), start=1):
            between = [float(time) for time in candidates if after < time < before]
            if between:
                grids = [(*times[:place], time, *times[place:]) for time in between]
                found.append(_least(grids, value, num_checks))
                bump = max(bump, bump_of([tried[grid] for grid in grids if grid in tried]))
        times = min(found, key=value)
    return Search(times, value(times), tried, bump, paths.passes)


def _least(grids: Sequence[Times], value: Callable[[Times], float], num_checks: int) -> Times:
    """Return the best of the grids that a ternary search tries, and of a few more."""
    best = ternary_minimum(lambda index: value(grids[index]), len(grids))
    checks = torch.linspace(0, len(grids) - 1, num_checks + 2).round().long().tolist()[1:-1]
    return min((grids[index] for index in [best, *checks]), key=value)


class _Paths:
    """What a sampler does from the same noise at any times: the predictions of all first times are kept."""

    def __init__(
        self,
        model: DiffusionModel,
        noise: Tensor,
        conditioning: Conditioning,
        sampler: Sampler,
        *,
        scale: float,
        denoiser: nn.Module | None,
        batch_size: int,
        num_steps: int,
        seed: int,
    ) -> None:
        self.model, self.conditioning, self.sampler, self.noise = model, conditioning, sampler, noise
        self.scale, self.denoiser, self.batch_size = scale, denoiser, batch_size
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(noise))]
        self.draws = [draw_noise(noise, generators) for _ in range(num_steps)]
        self.predictions: dict[Times, Prediction] = {}
        self.passes = 0

    def x0(self, times: Times) -> Tensor:
        """Return the latents [B, C, H, W] at the end of the grid through these times."""
        end = float(self.model.schedule.timesteps(1)[-1])
        return self._step(times, end)

    def _step(self, times: Times, s: float) -> Tensor:
        """Return the latents at s, the next after these times."""
        t, following = (torch.full((len(self.noise),), time, device=self.noise.device) for time in (times[-1], s))
        prediction = self._prediction(times)
        scales = self.sampler.scales(self.model.schedule, t, following)
        step = transition(prediction.x0, prediction.epsilon, scales)
        return (step.mean + broadcast_to(step.std, step.mean) * self.draws[len(times) - 1]).to(self.noise.dtype)

    def _prediction(self, times: Times) -> Prediction:
        """Return the prediction at the last of the times, after steps through the others."""
        if times not in self.predictions:
            latents = self.noise if len(times) == 1 else self._step(times[:-1], times[-1])
            t = torch.full((len(latents),), times[-1], device=latents.device)
            parts = [
                self.model.denoise(
                    latents[rows],
                    t[rows],
                    {key: value[rows] for key, value in self.conditioning.items()},
                    guidance_scale=self.scale,
                    denoiser=self.denoiser,
                )
                for rows in (slice(i, i + self.batch_size) for i in range(0, len(latents), self.batch_size))
            ]
            self.passes += len(latents)
            self.predictions[times] = Prediction(
                torch.cat([part.x0 for part in parts]), torch.cat([part.epsilon for part in parts])
            )
        return self.predictions[times]
