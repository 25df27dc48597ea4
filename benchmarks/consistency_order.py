"""Theorem 1 of consistency models: the error of distillation's minimiser falls with the solver's order.

    python benchmarks/consistency_order.py

The minimiser is the chain of one-step solver updates from T to ε. Its RMS distance at T to the exact consistency
function is drawn against the number of intervals, for Euler's and Heun's steps, on one Gaussian and on the embedded
mixture. 30 seconds on one core; writes `docs/consistency_order.png` and prints the slopes.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from agents.consistency import Euler, Heun, Solver
from agents.consistency.times import karras_levels
from diffusion_gym.consistency_function import exact_consistency
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import MixtureModel
from diffusion_gym.schedules import KarrasSchedule

INTERVALS = (10, 20, 40, 80, 160, 320, 640)
COUNT, EPSILON, T = 512, 0.002, 80.0
MEAN, STD = torch.tensor([1.0, -1.0], dtype=torch.float64), 0.5

Denoise = Callable[[Tensor, Tensor], Tensor]


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """Return E[x_0|x] of N((1, −1), ½²)."""
    return MEAN + STD**2 / (STD**2 + sigma**2)[:, None] * (x - MEAN)


def chain(denoise: Denoise, solver: Solver, x: Tensor, num_intervals: int) -> Tensor:
    """Return where x at T is led to by the solver's steps."""

    def predict(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        x0 = denoise(x, sigma)
        return x0, (x - x0) / sigma[:, None]

    schedule = KarrasSchedule()
    levels = karras_levels(schedule, EPSILON, num_intervals + 1).flip(0)
    for t, s in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        times = (torch.full((COUNT,), time, dtype=torch.float64) for time in (t, s))
        x = solver.step(predict, x, *times, schedule)
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/consistency_order.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(COUNT, 2, generator=generator, dtype=torch.float64)
    model = load_model("mixture")
    assert isinstance(model, MixtureModel)
    present = torch.ones(COUNT, len(model.names))

    def mixture(x: Tensor, sigma: Tensor) -> Tensor:
        return model.denoiser.posterior_mean(x, torch.ones_like(sigma), sigma, present)

    data = model.draw(model.encode_prompts(["anything"] * COUNT), generator).flatten(1).double()
    starts = {
        "Gaussian": (gaussian, MEAN + STD * torch.randn(COUNT, 2, generator=generator, dtype=torch.float64)),
        "mixture": (mixture, data),
    }
    figure, axes = plt.subplots(figsize=(5.2, 4), layout="constrained")
    for name, (denoise, x0) in starts.items():
        x = x0 + T * noise
        top = torch.full((COUNT,), T, dtype=torch.float64)
        exact = exact_consistency(denoise, x, top, num_steps=1600)
        for solver in (Euler(), Heun()):
            errors = []
            for count in INTERVALS:
                away = chain(denoise, solver, x, count) - exact
                errors.append(float(away.square().sum(1).mean().sqrt()))
            order = math.log2(errors[-2] / errors[-1])
            label = f"{name}, {type(solver).__name__}: order {order:.2f}"
            print(label, " ".join(f"{error:.3g}" for error in errors))
            axes.loglog(INTERVALS, errors, marker="o", ms=4, ls="-" if name == "mixture" else "--", label=label)
    axes.set(xlabel="intervals N − 1 (Δt ∝ 1/(N − 1))", ylabel="RMS error at T")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
