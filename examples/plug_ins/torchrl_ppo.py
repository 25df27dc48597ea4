"""TorchRL trains the embedded UNet: its collector, its advantages, its ClipPPOLoss.

python examples/plug_ins/torchrl_ppo.py
"""

import time
from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from gymnasium.vector import VectorEnv
from torchrl.collectors import Collector
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import diffusion_gym  # noqa: F401
from agents import DenoisingPolicy, ValueNetwork, evaluate
from agents.adapters.torchrl import DiffusionTorchRLEnv, critic_of, denoising_actor
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
    """Adam's, for the UNet, with an ε of 1e-5; the critic's is ten times that."""
    clip_epsilon: float = 1.6e-3
    """Of the ratio of mean log-probs: the published 1e-4 for latents of 16,384 dimensions is this for 1,024."""
    num_eval: int = 96
    """Images before and after, of the training's prompts and other seeds; a multiple of num_envs."""
    seed: int = 0
    """Of the training."""
    quick: bool = False
    """Two rollouts of few images: only to see that it runs."""

    def __post_init__(self) -> None:
        if self.quick:
            self.iterations, self.num_envs, self.num_steps, self.num_eval = 2, 4, 2, 8


def make_env(args: Args, reward: str | Reward, **shared: object) -> VectorEnv:
    return gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=args.num_envs,
        num_steps=args.num_steps,
        reward=reward,
        autoreset_mode="DISABLED",
        **shared,
    )


def train(env: DiffusionTorchRLEnv, policy: DenoisingPolicy, args: Args) -> None:
    actor = denoising_actor(policy, env)
    critic = critic_of(ValueNetwork(env.env.single_observation_space, seed=args.seed), env)
    loss = ClipPPOLoss(actor, critic, clip_epsilon=args.clip_epsilon, entropy_bonus=False, normalize_advantage=True)
    advantages = GAE(gamma=1.0, lmbda=1.0, value_network=critic)
    groups = [{"params": [*policy.parameters()]}, {"params": [*critic.parameters()], "lr": 10 * args.learning_rate}]
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, eps=1e-5)
    frames = args.num_envs * args.num_steps
    env.set_seed(1_000_000 + args.seed)
    collector = Collector(
        env,
        actor,
        frames_per_batch=frames,
        total_frames=args.iterations * frames,
        auto_register_policy_transforms=False,
    )
    for iteration, batch in enumerate(collector, start=1):
        with torch.no_grad():
            advantages(batch)
        transitions = batch.reshape(-1)
        for rows in torch.randperm(frames).chunk(args.updates):
            losses = loss(transitions[rows])
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        reward = batch["next", "reward"][batch["next", "done"]].mean()
        print(f"iteration {iteration}: reward {reward:.4f}, clip_fraction {losses['clip_fraction']:.3f}", flush=True)
    collector.shutdown()


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    started = time.process_time()
    torch.manual_seed(args.seed)
    # A critic begins at 0. Until it has learnt a mean that is far from there, advantages are mostly its own errors.
    env = DiffusionTorchRLEnv(make_env(args, Normalised(args.reward)))
    judged = make_env(args, args.reward, model=env.model)
    policy = DenoisingPolicy(env.model, precision="auto", seed=args.seed)
    before = evaluate(judged, policy, seeds=range(args.num_eval))
    train(env, policy, args)
    after = evaluate(judged, policy, seeds=range(args.num_eval))
    gain, error = after.gain_over(before)
    print(
        f"{args.reward}: {before.mean:.4f} ± {before.standard_error:.4f} -> {after.mean:.4f} ± "
        f"{after.standard_error:.4f}, {gain:+.4f} ± {error:.4f}, after {args.iterations * args.num_envs} images and "
        f"{time.process_time() - started:.0f} s of CPU"
    )


if __name__ == "__main__":
    main()
