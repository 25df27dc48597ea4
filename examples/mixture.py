"""Policy gradients where everything is known: a Gaussian mixture moves toward a reward, in seconds.

    python examples/mixture.py

40 seconds on 2 cores. The samples of eight components on a circle are rewarded for lying to the right. DDPO-IS moves
them there, first by leaving the left components, then by leaving the data for the edge of the picture. RLOO with a KL
penalty tilts the mixture and stays in it. Prints the mean reward, and the mean log-density under the data, which says
whether a sample could still be one; writes `runs/mixture/samples.png`.
"""

from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv
from torch import Tensor

import diffusion_gym  # noqa: F401
from agents import DDPOIS, KL, RLOO, DenoisingPolicy, Policy, Rollouts, evaluate
from agents.training.algorithm import Algorithm
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import MixtureModel


@dataclass
class Args:
    """Two algorithms on the mixture."""

    updates: int = 30
    """Rollouts to learn from, one update each."""
    num_envs: int = 512
    """Samples drawn together."""
    num_steps: int = 20
    """Denoising steps."""
    learning_rate: float = 3e-3
    """AdamW's."""
    kl_coefficient: float = 1.0
    """The weight of the KL divergence to the untrained policy, for RLOO."""
    num_pictures: int = 4
    """Pictures of each algorithm's samples, the one before training included."""
    seed: int = 0
    """Of the training; the samples shown are those of the seeds 0, 1, 2 …"""
    output: Path = Path("runs/mixture")
    """Where to write."""


def samples(env: VectorEnv, policy: Policy, model: MixtureModel) -> Tensor:
    """Return where one sample per lane ends, [B, 2]."""
    drawn = evaluate(
        env, policy, seeds=range(env.num_envs), prompts=["anything"] * env.num_envs, max_images=env.num_envs
    )
    return model.positions(drawn.images)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    model = load_model("mixture")
    assert isinstance(model, MixtureModel)

    def rightness(images: Tensor, prompts: object, metadata: object) -> Tensor:
        return model.positions(images)[:, 0]

    env = gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=args.num_envs,
        model=model,
        reward=rightness,
        prompts=["anything"],
        num_steps=args.num_steps,
        autoreset_mode="DISABLED",
    )
    shared = {"learning_rate": args.learning_rate, "seed": args.seed}
    algorithms: dict[str, Algorithm] = {
        "DDPO-IS": DDPOIS(DenoisingPolicy(model), env, batch_size=None, clip_range=1e-2, rollouts=Rollouts(), **shared),
        f"RLOO, KL {args.kl_coefficient:g}": RLOO(
            DenoisingPolicy(model),
            env,
            log_prob_reduction="sum",
            clip_range=0.2,
            rollouts=Rollouts(group_size=args.num_envs),
            kl=KL(args.kl_coefficient),
            **shared,
        ),
    }
    figure, axes = plt.subplots(
        len(algorithms),
        args.num_pictures,
        figsize=(3 * args.num_pictures, 2.8 * len(algorithms)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    data = model.draw(model.encode_prompts(["anything"] * 2000), torch.Generator().manual_seed(0)).flatten(1)
    clean = model.encode_prompts(["anything"] * args.num_envs)
    updates = [round(args.updates * share) for share in np.linspace(0, 1, args.num_pictures)]
    for row, (name, algorithm) in zip(axes, algorithms.items(), strict=True):
        for done, ax in zip(updates, row, strict=True):
            timesteps = done * args.num_envs * args.num_steps
            algorithm.learn(timesteps - algorithm.num_timesteps, reset_num_timesteps=False, log_interval=0)
            x = samples(env, algorithm.policy, model)
            density = model.log_prob(x[:, :, None, None], torch.full((len(x),), -1.0), clean).mean()
            print(
                f"{name} after {done} updates: mean reward {x[:, 0].mean():+.2f}, mean log-density "
                f"under the data {density:.1f}"
            )
            ax.scatter(*data.T, s=2, color="lightgray", label="data")
            ax.scatter(*x.T, s=3, color="tab:blue", label="samples")
            ax.set(title=f"{name}, {done} updates", aspect="equal", xlim=(-3.2, 4.3), ylim=(-3.2, 3.2))
    axes[0, 0].legend(loc="upper right", markerscale=3)
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "samples.png", dpi=110)
    print(f"{args.output / 'samples.png'} written")


if __name__ == "__main__":
    main()
