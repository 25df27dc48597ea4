"""What advantages are compared with: a critic, a prompt's own statistics, or the rollout's mean, at equal queries.

    python benchmarks/baselines.py

DDPO-IS on the embedded UNet; the held-out gain of each seed, and their mean with its standard error over seeds.
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

    reward: str = "incompressibility"
    """A reward's name."""
    queries: int = 192
    """Images that each may have judged."""
    num_envs: int = 32
    """Lanes, and images of a rollout."""
    num_steps: int = 5
    """Denoising steps."""
    learning_rate: float = 3e-4
    """Adam's."""
    num_prompts: int = 4
    """Prompts of the training: the fewer, the more a prompt's statistics know of it."""
    num_eval: int = 64
    """Held-out images before and after."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    env = gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=args.num_envs,
        num_steps=args.num_steps,
        reward=args.reward,
        autoreset_mode="DISABLED",
        prompts=["a cat", "a dog", "a horse", "a monkey", "a rabbit", "a zebra", "a spider", "a bird"][
            : args.num_prompts
        ],
    )
    model = env.unwrapped.model
    before = evaluate(env, DenoisingPolicy(model, precision="auto", seed=0), seeds=range(args.num_eval))
    print(f"| baseline | gain of each seed, from {before.mean:.3f} | mean | seconds of CPU |\n|---|---|---|---|")
    for name, advantages in BASELINES.items():
        gains, started = [], time.process_time()
        for seed in args.seeds:
            policy = DenoisingPolicy(model, precision="auto", seed=seed)
            DDPOIS(
                policy,
                env,
                learning_rate=args.learning_rate,
                batch_size=args.num_envs // 2,
                clip_range=1.6e-3,
                optimizer=AdamW(weight_decay=0.0, epsilon=1e-5),
                advantages=advantages,
                rollouts=Rollouts(samples=args.num_envs),
                seed=seed,
            ).learn(args.queries * args.num_steps, log_interval=0)
            gains.append(evaluate(env, policy, seeds=range(args.num_eval)).gain_over(before)[0])
        error = np.std(gains, ddof=1) / len(gains) ** 0.5
        each = ", ".join(f"{gain:+.3f}" for gain in gains)
        print(
            f"| {name} | {each} | {np.mean(gains):+.3f} ± {error:.3f} | {time.process_time() - started:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
