"""What it saves to call the denoiser for running lanes alone: against lock-step masking, as the published code does it.

    python benchmarks/variable_length.py

One policy (TPDM's first schedule: Betas with mode .818 and concentration 16.9), the same seeds and draws on both sides,
run in turn; the ratio of wall times is taken pair by pair. The images of the two must be equal.
"""

import statistics
import time
from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from gymnasium.vector import VectorEnv

import diffusion_gym  # noqa: F401
from agents import ContextFreeSchedule, collect
from agents.experience.rollouts import Rollout
from diffusion_gym.envs.time_prediction import TimePredictionVectorEnv
from diffusion_gym.models import load_model


@dataclass
class Args:
    """The work that both sides do."""

    num_pairs: int = 5
    """Pairs of runs for each batch size."""
    batches: tuple[int, ...] = (8, 64)
    """Episodes launched together."""
    max_steps: int = 40
    """The most steps of an episode."""
    num_threads: int = 2
    """CPU threads."""


class LockStep(TimePredictionVectorEnv):
    """Asks the denoiser about every lane until the last one is through."""

    def _before_observing(self) -> None:
        self._unseen[:] = self._unseen.any()
        super()._before_observing()


def timed(env: VectorEnv, policy: ContextFreeSchedule, seed: int) -> tuple[float, Rollout]:
    started = time.perf_counter()
    rollout = collect(
        env, policy, seeds=[seed], generators=torch.Generator().manual_seed(seed), max_images=env.num_envs
    )
    assert rollout is not None
    return time.perf_counter() - started, rollout


def main() -> None:
    args = tyro.cli(Args)
    torch.set_num_threads(args.num_threads)
    model = load_model("emoji")
    policy = ContextFreeSchedule([0.818] * args.max_steps, initial_concentration=16.9)
    for batch in args.batches:
        arguments = {"model": model, "reward": "brightness", "max_steps": args.max_steps}
        retired = gym.make_vec("TimePredictionMDP-v0", num_envs=batch, autoreset_mode="DISABLED", **arguments)
        masked = LockStep(batch, autoreset_mode="DISABLED", **arguments)
        timed(retired, policy, 0), timed(masked, policy, 0)
        ratios, calls, difference = [], [], 0.0
        for seed in range(args.num_pairs):
            (one, few), (other, all_of_them) = timed(retired, policy, seed), timed(masked, policy, seed)
            assert few.lengths.tolist() == all_of_them.lengths.tolist()
            difference = max(difference, float((few.images - all_of_them.images).abs().max()))
            ratios.append(other / one)
            calls.append(batch * few.num_steps / few.lengths.sum())
        print(
            f"batch {batch}: lock-step takes {statistics.median(ratios):.3f} times as long (median of "
            f"{args.num_pairs} pairs, {min(ratios):.3f} to {max(ratios):.3f}; {statistics.mean(calls):.3f} times the "
            f"network calls); largest difference of a pixel {difference:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
