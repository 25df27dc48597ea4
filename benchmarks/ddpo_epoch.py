"""One DDPO-IS epoch on the embedded model: samples per second, the UNet's share of the time, memory.

    python benchmarks/ddpo_epoch.py

64 samples, 20 steps, guidance on, batch 16, the whole UNet trained in float32. The UNet's share is the time inside its
forward passes and inside `backward`; what is left is the environment, the policy's arithmetic, the image decoder, the
JPEG reward, the optimizer and Python.
"""

import resource
import time
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import torch
import tyro

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DenoisingPolicy, Rollouts


@dataclass
class Args:
    """The epoch."""

    num_epochs: int = 3
    """Epochs to measure, after one to warm up on."""
    samples_per_epoch: int = 64
    """Images per epoch."""
    num_envs: int = 16
    """Images drawn together, and transitions per backward pass."""
    num_steps: int = 20
    """Denoising steps."""
    precision: Literal["bf16"] | None = None
    """Precision of the UNet's arithmetic: "bf16", or None, that of its weights."""
    num_threads: int = 2
    """CPU threads."""


class Stopwatch:
    """Seconds spent inside the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function):  # type: ignore[no-untyped-def]
        def timed(*args, **kwargs):  # type: ignore[no-untyped-def]
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def main() -> None:
    args = tyro.cli(Args)
    torch.set_num_threads(args.num_threads)
    env = gym.make_vec("DenoisingMDP-v0", num_envs=args.num_envs, num_steps=args.num_steps)
    policy = DenoisingPolicy(env.unwrapped.model, precision=args.precision, seed=0)
    rollouts = Rollouts(samples=args.samples_per_epoch)
    algorithm = DDPOIS(policy, env, batch_size=None, rollouts=rollouts, seed=0)
    timesteps = args.samples_per_epoch * args.num_steps
    algorithm.learn(timesteps, log_interval=0)

    forward, backward = Stopwatch(), Stopwatch()
    policy.denoiser.forward = forward.around(policy.denoiser.forward)
    torch.Tensor.backward = backward.around(torch.Tensor.backward)
    started = time.perf_counter()
    algorithm.learn(timesteps * args.num_epochs, log_interval=0)
    elapsed = time.perf_counter() - started
    unet = (forward.seconds + backward.seconds) / elapsed
    print(f"{args.samples_per_epoch * args.num_epochs / elapsed:.2f} samples/s")
    print(
        f"UNet: {unet:.1%} of the time "
        f"(forward {forward.seconds / elapsed:.1%}, backward {backward.seconds / elapsed:.1%})"
    )
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
