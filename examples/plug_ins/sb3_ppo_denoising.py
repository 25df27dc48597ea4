"""Stable-Baselines3's stock PPO trains the embedded UNet.

python examples/plug_ins/sb3_ppo_denoising.py
"""

import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.vector import VectorEnv
from PIL import Image
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

import diffusion_gym  # noqa: F401
from agents import Evaluation, evaluate
from agents.adapters.sb3 import DenoisingActorCriticPolicy, DiffusionVecEnv
from diffusion_gym.rewards import Normalised, Reward


@dataclass
class Args:
    """PPO on the denoising MDP."""

    reward: str = "brightness"
    """A reward's name."""
    iterations: int = 20
    """Rollouts, each of one image per lane."""
    num_envs: int = 32
    """Lanes."""
    num_steps: int = 5
    """Denoising steps per image."""
    updates: int = 2
    """Optimizer steps per rollout."""
    learning_rate: float = 3e-4
    """Adam's, for the UNet, with SB3's ε of 1e-5; the critic's is ten times that."""
    clip_range: float = 1.6e-3
    """Of the ratio of mean log-probs: the published 1e-4 for latents of 16,384 dimensions is this for 1,024."""
    num_eval: int = 96
    """Images before and after, of the training's prompts and other seeds; a multiple of num_envs."""
    seed: int = 0
    """Of the training."""
    output: Path = Path("runs/sb3_ppo_denoising")
    """Where to write the zip and the picture."""
    quick: bool = False
    """Two rollouts of few images: only to see that it runs."""

    def __post_init__(self) -> None:
        if self.quick:
            self.iterations, self.num_envs, self.num_steps, self.num_eval = 2, 4, 2, 8


def make_env(args: Args, reward: str | Reward, **shared: object) -> VectorEnv:
    return gym.make_vec("DenoisingMDP-v0", num_envs=args.num_envs, num_steps=args.num_steps, reward=reward, **shared)


def save_picture(path: Path, before: Evaluation, after: Evaluation) -> None:
    """Write the first eight images before the training, and under each the one after it, from the same noise."""
    rows = [np.concatenate([*np.asarray(one.images[:8].permute(0, 2, 3, 1))], axis=1) for one in (before, after)]
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(path)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    started = time.process_time()
    # A critic begins at 0. Until it has learnt a mean that is far from there, advantages are mostly its own errors.
    env = DiffusionVecEnv(make_env(args, Normalised(args.reward)))
    judged = make_env(args, args.reward, model=env.model)
    learner = PPO(
        DenoisingActorCriticPolicy,
        VecMonitor(env),
        n_steps=args.num_steps,
        batch_size=args.num_steps * args.num_envs // args.updates,
        n_epochs=1,
        gamma=1.0,
        gae_lambda=1.0,
        clip_range=args.clip_range,
        learning_rate=args.learning_rate,
        policy_kwargs={"model": env.model, "precision": "auto"},
        seed=args.seed,
        device="cpu",
        verbose=1,
    )
    actor = learner.policy.actor
    before = evaluate(judged, actor, seeds=range(args.num_eval))
    print(f"SB3's rollout buffer has {env.rollout_bytes(args.num_steps) / 1e6:.1f} MB")
    learner.learn(args.iterations * args.num_envs * args.num_steps)
    after = evaluate(judged, actor, seeds=range(args.num_eval))
    gain, error = after.gain_over(before)
    print(
        f"{args.reward}: {before.mean:.4f} ± {before.standard_error:.4f} -> {after.mean:.4f} ± "
        f"{after.standard_error:.4f}, {gain:+.4f} ± {error:.4f}, after {args.iterations * args.num_envs} images and "
        f"{time.process_time() - started:.0f} s of CPU"
    )
    args.output.mkdir(parents=True, exist_ok=True)
    learner.save(args.output / "ppo")
    save_picture(args.output / "before_after.png", before, after)


if __name__ == "__main__":
    main()
