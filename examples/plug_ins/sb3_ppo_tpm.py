"""Stable-Baselines3's stock PPO trains a time predictor: how few network calls does a picture need?

python examples/plug_ins/sb3_ppo_tpm.py
"""

import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import tyro
from gymnasium.vector import VectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

import diffusion_gym  # noqa: F401
from agents import Evaluation, Policy, evaluate
from agents.adapters.sb3 import DiffusionVecEnv, TimePredictionActorCriticPolicy
from diffusion_gym.grids import karras_grid, step_ratios
from diffusion_gym.rewards import make_reward


@dataclass
class Args:
    """PPO on the time-prediction MDP: the image-text scorer's opinion, less a price for every network call."""

    price: float = 0.01
    """Of a network call, in cosine of the scorer."""
    timesteps: int = 6_144
    """Network calls to learn from."""
    num_envs: int = 32
    """Lanes."""
    n_steps: int = 12
    """Steps per lane and rollout."""
    n_epochs: int = 4
    """Passes over a rollout."""
    learning_rate: float = 3e-3
    """Adam's."""
    initial_steps: int = 12
    """Steps of the Karras grid that the predictor starts from."""
    num_eval: int = 64
    """Held-out images before and after; a multiple of num_envs."""
    seed: int = 0
    """Of the training; the held-out seeds are 0, 1, 2 …"""
    output: Path = Path("runs/sb3_ppo_tpm")
    """Where to write the zip and the picture."""
    quick: bool = False
    """Two rollouts of few lanes: only to see that it runs."""

    def __post_init__(self) -> None:
        if self.quick:
            self.timesteps, self.num_envs, self.n_steps, self.num_eval = 48, 4, 6, 8


def make_env(args: Args, autoreset_mode: str, **shared: object) -> VectorEnv:
    """Return the environment; its frozen model has a guidance of 2, at which more steps pay most."""
    return gym.make_vec(
        "TimePredictionMDP-v0",
        num_envs=args.num_envs,
        reward="emoji_alignment",
        step_cost="linear",
        step_cost_weight=args.price,
        guidance_scale=2.0,
        autoreset_mode=autoreset_mode,
        **shared,
    )


def describe(result: Evaluation) -> str:
    """Return reward, calls and alignment of an evaluation, as text."""
    alignment = make_reward("emoji_alignment")(result.images, result.prompts).values.mean()
    return (
        f"reward {result.mean:.4f} ± {result.standard_error:.4f}, {result.lengths.mean():.2f} network calls, "
        f"alignment {alignment:.4f}"
    )


def judge(env: VectorEnv, policy: Policy, args: Args) -> Evaluation:
    """Return one image for each held-out seed."""
    return evaluate(env, policy, seeds=range(args.num_eval), max_images=args.num_eval)


def save_picture(path: Path, before: Evaluation, after: Evaluation) -> None:
    """Write twelve images before the training, and under each the one after it, with their calls."""
    figure, axes = plt.subplots(2, 12, figsize=(18, 3.6))
    for row, result in zip(axes, (before, after), strict=True):
        for axis, image, calls in zip(row, result.images, result.lengths, strict=False):
            axis.imshow(np.clip(image.permute(1, 2, 0), 0, 1))
            axis.set_title(f"{calls} calls", fontsize=9)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    started = time.process_time()
    env = DiffusionVecEnv(make_env(args, "SAME_STEP"))
    judged = make_env(args, "DISABLED", model=env.model)  # episodes differ in length: all lanes run to their ends
    schedule = env.model.schedule
    grid = karras_grid(schedule, args.initial_steps)
    learner = PPO(
        TimePredictionActorCriticPolicy,
        VecMonitor(env),
        n_steps=args.n_steps,
        batch_size=args.n_steps * args.num_envs // 4,
        n_epochs=args.n_epochs,
        gamma=1.0,
        gae_lambda=1.0,
        learning_rate=args.learning_rate,
        policy_kwargs={"initial_ratio": dict(zip(grid.tolist(), step_ratios(schedule, grid).tolist(), strict=False))},
        seed=args.seed,
        device="cpu",
        verbose=1,
    )
    before = judge(judged, learner.policy.actor, args)
    print(f"SB3's rollout buffer has {env.rollout_bytes(args.n_steps) / 1e6:.0f} MB")
    learner.learn(args.timesteps)
    after = judge(judged, learner.policy.actor, args)
    gain, error = after.gain_over(before)
    print(f"before: {describe(before)}\nafter:  {describe(after)}")
    print(f"gain {gain:+.4f} ± {error:.4f}; {time.process_time() - started:.0f} s of CPU")
    args.output.mkdir(parents=True, exist_ok=True)
    learner.save(args.output / "ppo")
    save_picture(args.output / "before_after.png", before, after)


if __name__ == "__main__":
    main()
