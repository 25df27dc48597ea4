"""An algorithm of one's own, Simple Policy Optimization (SPO), against DDPO-IS at as many reward queries.

    python examples/my_algorithm.py

Where PPO's clip stops an action's gradient, SPO pulls the ratio ρ back, so that no action is ever without a gradient:

    L = −E[ ρ·A − |A|/(2·clip_range)·(ρ − 1)² ]        ∂L/∂log π = ρ·(|A|/clip_range·(ρ − 1) − A)

Source: Xie et al., 2025, https://arxiv.org/abs/2401.16025.
"""

from dataclasses import dataclass
from typing import Literal, final

import gymnasium as gym
import tyro
from torch import Tensor

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    Algorithm,
    DenoisingPolicy,
    Groups,
    Muon,
    PolicyGradient,
    Rollouts,
    Steps,
    Surrogate,
    Window,
    evaluate,
)
from agents.losses import bounded_ratio


@final
@dataclass(kw_only=True, eq=False, repr=False)
class SPO(PolicyGradient):
    """Simple Policy Optimization, with GRPO's advantages.

    Args:
        clip_range: How far from 1 the ratio of an action with advantage ±1 is drawn to.
    """

    advantages: Groups = Groups("group_mean", scale="group")
    rollouts: Rollouts = Rollouts(group_size=4)
    clip_range: float = 1e-4

    def surrogate(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Surrogate:
        """Return |A|/(2·clip_range)·(ρ − 1)² − ρ·A of each action, and its gradient."""
        ratio = bounded_ratio(log_prob, old_log_prob)
        pull = advantages.abs() / self.clip_range * (ratio - 1)
        loss = pull * (ratio - 1) / 2 - ratio * advantages
        return Surrogate(loss, ratio * (pull - advantages), {"distance": (ratio - 1).abs()})


@dataclass
class Args:
    """SPO against DDPO-IS, or either alone."""

    algorithms: tuple[str, ...] = ("SPO", "DDPO-IS")
    """Which."""
    reward_queries: int = 640
    """Images that each may have judged."""
    num_envs: int = 64
    """Images drawn together, half of them for each update."""
    num_steps: int = 10
    """Denoising steps per image; the first four are stochastic in training and learnt from."""
    num_eval: int = 128
    """Held-out images before and after; a multiple of num_envs."""
    precision: Literal["auto", "bf16", "fp16"] | None = "auto"
    """Of the denoiser's arithmetic: "auto" is "bf16" where the device has instructions for it; None that of its
    weights."""
    seed: int = 0
    """Of the trainings."""


def make(name: str, env: gym.vector.VectorEnv, args: Args) -> Algorithm:
    """Return one of the algorithms; they differ in the surrogate alone."""
    policy = DenoisingPolicy(env.unwrapped.model, precision=args.precision, seed=args.seed)
    rollouts = Rollouts(samples=args.num_envs, group_size=8, prompt_sampling="round_robin")
    steps = Steps(weights="inverse_sensitivity", window=Window(4, within=(0, 4)))
    return (SPO if name == "SPO" else DDPOIS)(
        policy,
        env,
        learning_rate=1e-3,
        batch_size=args.num_envs // 2,
        optimizer=Muon(warmup_updates=4),
        rollouts=rollouts,
        advantages=Groups("group_mean", scale="group"),
        steps=steps,
        clip_range=1.6e-3,
        seed=args.seed,
    )


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    env = gym.make_vec("DenoisingMDP-v0", num_envs=args.num_envs, num_steps=args.num_steps)
    for name in args.algorithms:
        algorithm = make(name, env, args)
        before = evaluate(env, algorithm.policy, seeds=range(args.num_eval))
        algorithm.learn(args.reward_queries * args.num_steps, progress_bar=True)
        gain, error = evaluate(env, algorithm.policy, seeds=range(args.num_eval)).gain_over(before)
        print(f"{name}: {before.mean:.3f} kB {gain:+.3f} ± {error:.3f} after {algorithm.reward_queries} queries")


if __name__ == "__main__":
    main()
