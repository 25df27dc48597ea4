"""What advantages are compared with: a critic, a prompt's own statistics, or the rollout's mean, at equal queries.

    python benchmarks/baselines.py

DDPO-IS; the mean held-out gain over trainings, with its standard error, and how much trainings differ.
"""

import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import tyro

import diffusion_gym  # noqa: F401
from agents import DDPOIS, AdamW, Batch, Critic, DenoisingPolicy, PerPrompt, Rollouts, evaluate

BASELINES = {
    "critic": Critic(),
    "statistics of each prompt": PerPrompt(16, min_count=2),
    "mean of the rollout": Batch(),
}


@dataclass
class Args:
    """Trainings to compare."""

    model: str = "mixture"
    """A model's name: "mixture" takes a minute, "emoji" ten minutes a seed."""
    reward: str = "brightness"
    """A reward's name."""
    queries: int = 256
    """Images that each may have judged."""
    num_envs: int = 32
    """Lanes, and images of a rollout."""
    num_steps: int = 5
    """Denoising steps."""
    learning_rate: float = 3e-3
    """Adam's; for "emoji" 3e-4."""
    clip_range: float = 0.1
    """Of the ratio of mean log-probs; for "emoji" 1.6e-3."""
    num_eval: int = 64
    """Held-out images before and after."""
    seeds: tuple[int, ...] = tuple(range(16))
    """Of the trainings."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    env = gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=args.num_envs,
        num_steps=args.num_steps,
        reward=args.reward,
        autoreset_mode="DISABLED",
        model=args.model,
    )
    model = env.unwrapped.model
    precision = "auto" if args.model != "mixture" else None
    before = evaluate(env, DenoisingPolicy(model, precision=precision, seed=0), seeds=range(args.num_eval))
    print(f"from {before.mean:.3f}, {args.queries} queries, {len(args.seeds)} trainings")
    print("| baseline | gain | standard deviation over trainings | seconds of CPU |\n|---|---|---|---|")
    for name, advantages in BASELINES.items():
        gains, started = [], time.process_time()
        for seed in args.seeds:
            policy = DenoisingPolicy(model, precision=precision, seed=seed)
            DDPOIS(
                policy,
                env,
                learning_rate=args.learning_rate,
                batch_size=args.num_envs // 2,
                clip_range=args.clip_range,
                optimizer=AdamW(weight_decay=0.0, epsilon=1e-5),
                advantages=advantages,
                rollouts=Rollouts(samples=args.num_envs),
                seed=seed,
            ).learn(args.queries * args.num_steps, log_interval=0)
            gains.append(evaluate(env, policy, seeds=range(args.num_eval)).gain_over(before)[0])
        deviation = np.std(gains, ddof=1)
        print(
            f"| {name} | {np.mean(gains):+.4f} ± {deviation / len(gains) ** 0.5:.4f} | {deviation:.4f} | "
            f"{time.process_time() - started:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
