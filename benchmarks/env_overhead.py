"""What the environment costs: a rollout of `DenoisingPolicy` against diffusers' own pipeline, doing the same work.

    python benchmarks/env_overhead.py

The same steps, batch, guidance and η, ending in decoded images on both sides (no reward). The two are run in turn and
the ratio is taken pair by pair. The bar is 1.03.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from diffusers import StableDiffusionPipeline

import diffusion_gym  # noqa: F401
from agents import DenoisingPolicy, collect
from diffusion_gym.samplers import DDIM


@dataclass
class Args:
    """The work that both sides do."""

    num_pairs: int = 9
    """Pairs of runs."""
    num_envs: int = 16
    """Images per run."""
    num_steps: int = 20
    """Denoising steps."""
    eta: float = 1.0
    """DDIM's η."""
    guidance_scale: float = 4.0
    """Classifier-free guidance."""
    num_threads: int = 2
    """CPU threads."""


def no_reward(images: torch.Tensor, prompts: object, metadata: object) -> torch.Tensor:
    return torch.zeros(len(images))


def median_interval(ordered: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the narrowest pair of order statistics between which the median lies with at least this confidence.

    The number of values below the median is Binomial(n, ½).
    """
    size = len(ordered)
    for trimmed in range(size // 2, -1, -1):
        outside = 2 * sum(math.comb(size, below) for below in range(trimmed + 1)) / 2**size
        if outside <= 1 - confidence:
            return ordered[trimmed], ordered[size - 1 - trimmed]
    return ordered[0], ordered[-1]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    args = tyro.cli(Args)
    torch.set_num_threads(args.num_threads)
    env = gym.make_vec("DenoisingMDP-v0", num_envs=args.num_envs, num_steps=args.num_steps, reward=no_reward)
    model = env.unwrapped.model
    policy = DenoisingPolicy(model, sampler=DDIM(args.eta), guidance_scale=args.guidance_scale, seed=0)
    pipeline = StableDiffusionPipeline.from_pretrained(model.path)
    pipeline.set_progress_bar_config(disable=True)
    prompts = list(env.unwrapped.prompts)[: args.num_envs]

    def ours() -> object:
        return collect(env, policy, seeds=[0], options={"prompt": prompts})

    def theirs() -> object:
        return pipeline(
            prompts,
            num_inference_steps=args.num_steps,
            eta=args.eta,
            guidance_scale=args.guidance_scale,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )

    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(args.num_pairs)]
    ratios = sorted(one / other for one, other in pairs)
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    print(f"environment and policy {medians[0]:.2f} s, pipeline {medians[1]:.2f} s (medians of {args.num_pairs})")
    low, high = median_interval(ratios)
    print(f"ratio: median {statistics.median(ratios):.3f}, its 95 % interval {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
