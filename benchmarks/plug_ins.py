"""DDPO-IS, ours, against Stable-Baselines3's PPO and TorchRL's ClipPPOLoss: one policy, as many reward queries.

    python benchmarks/plug_ins.py

Each training has a process of its own, whose peak memory is the kernel's count. All have Adam with the same learning
rate, the same number of updates of the same size, the ratio of mean log-probs and the same clip, and the embedded UNet;
they differ in what advantages are compared with (ours: the rollout's mean; the others: a critic), in how rollouts are
kept, and in what is done beside. The libraries' critics are given a reward of zero mean (`Normalised`).
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv

import diffusion_gym  # noqa: F401
from agents import DDPOIS, AdamW, Batch, DenoisingPolicy, Rollouts, ValueNetwork, evaluate
from diffusion_gym.models import DiffusionModel, load_model
from diffusion_gym.rewards import Normalised, Reward

LIBRARIES = {"ours": "DDPO-IS, ours", "sb3": "PPO, Stable-Baselines3", "torchrl": "ClipPPOLoss, TorchRL"}


@dataclass
class Args:
    """Trainings to compare."""

    reward: str = "brightness"
    """A reward's name."""
    queries: int = 256
    """Images that each may have judged."""
    num_envs: int = 32
    """Lanes, and images of a rollout."""
    num_steps: int = 5
    """Denoising steps."""
    updates: int = 2
    """Optimizer steps per rollout."""
    learning_rate: float = 3e-4
    """Adam's."""
    clip_range: float = 1.6e-3
    """Of the ratio of mean log-probs."""
    num_eval: int = 64
    """Held-out images before and after."""
    seeds: tuple[int, ...] = (0,)
    """Of the trainings."""
    only: Literal["ours", "sb3", "torchrl"] | None = None
    """Train with this one, in this process; None: with all, each in its own."""


@dataclass
class Result:
    """A training's results.

    Args:
        gain: Of the held-out reward.
        error: The gain's standard error, over prompts.
        cpu: Seconds of CPU of the training alone.
        wall: Seconds of the training alone.
        memory: MB that the process had at its peak.
    """

    gain: float
    error: float
    cpu: float
    wall: float
    memory: float


def make_env(args: Args, model: DiffusionModel, reward: str | Reward, mode: str = "DISABLED") -> VectorEnv:
    return gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=args.num_envs,
        num_steps=args.num_steps,
        model=model,
        reward=reward,
        autoreset_mode=mode,
    )


def train_ours(args: Args, policy: DenoisingPolicy, seed: int) -> None:
    DDPOIS(
        policy,
        make_env(args, policy.model, args.reward),
        learning_rate=args.learning_rate,
        batch_size=args.num_envs // args.updates,
        clip_range=args.clip_range,
        optimizer=AdamW(weight_decay=0.0, epsilon=1e-5),
        advantages=Batch(),
        rollouts=Rollouts(samples=args.num_envs),
        seed=seed,
    ).learn(args.queries * args.num_steps, log_interval=0)


def train_sb3(args: Args, model: DiffusionModel, seed: int) -> DenoisingPolicy:
    from stable_baselines3 import PPO

    from agents.adapters.sb3 import DenoisingActorCriticPolicy, DiffusionVecEnv

    env = DiffusionVecEnv(make_env(args, model, Normalised(args.reward), "SAME_STEP"))
    learner = PPO(
        DenoisingActorCriticPolicy,
        env,
        n_steps=args.num_steps,
        batch_size=args.num_envs * args.num_steps // args.updates,
        n_epochs=1,
        gamma=1.0,
        gae_lambda=1.0,
        clip_range=args.clip_range,
        learning_rate=args.learning_rate,
        policy_kwargs={"model": model, "precision": "auto"},
        seed=seed,
        device="cpu",
    )
    return learner.learn(args.queries * args.num_steps).policy.actor


def train_torchrl(args: Args, policy: DenoisingPolicy, seed: int) -> None:
    from torchrl.collectors import Collector
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    from agents.adapters.torchrl import DiffusionTorchRLEnv, critic_of, denoising_actor

    torch.manual_seed(seed)
    env = DiffusionTorchRLEnv(make_env(args, policy.model, Normalised(args.reward)))
    env.set_seed(1_000_000 + seed)
    actor = denoising_actor(policy, env)
    critic = critic_of(ValueNetwork(env.env.single_observation_space, seed=seed), env)
    loss = ClipPPOLoss(actor, critic, clip_epsilon=args.clip_range, entropy_bonus=False, normalize_advantage=True)
    advantages = GAE(gamma=1.0, lmbda=1.0, value_network=critic)
    groups = [{"params": [*policy.parameters()]}, {"params": [*critic.parameters()], "lr": 10 * args.learning_rate}]
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, eps=1e-5)
    frames = args.num_envs * args.num_steps
    collector = Collector(
        env,
        actor,
        frames_per_batch=frames,
        total_frames=args.queries * args.num_steps,
        auto_register_policy_transforms=False,
    )
    for batch in collector:
        with torch.no_grad():
            advantages(batch)
        transitions = batch.reshape(-1)
        for rows in torch.randperm(frames).chunk(args.updates):
            losses = loss(transitions[rows])
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    collector.shutdown()


def train_one(args: Args) -> Result:
    model = load_model("emoji")
    policy = DenoisingPolicy(model, precision="auto", seed=args.seeds[0])
    judged = make_env(args, model, args.reward)
    before = evaluate(judged, policy, seeds=range(args.num_eval))
    cpu, wall = time.process_time(), time.perf_counter()
    if args.only == "sb3":
        policy = train_sb3(args, model, args.seeds[0])
    else:
        {"ours": train_ours, "torchrl": train_torchrl}[args.only](args, policy, args.seeds[0])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return Result(*evaluate(judged, policy, seeds=range(args.num_eval)).gain_over(before), cpu, wall, memory)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.only is not None:
        print(json.dumps(asdict(train_one(args))))
        return
    print(f"| | {args.reward} | seconds of CPU | of wall | peak memory, MB |\n|---|---|---|---|---|")
    for name, title in LIBRARIES.items():
        results = []
        for seed in args.seeds:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--seeds", str(seed)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results.append(Result(**json.loads(printed.splitlines()[-1])))
        gains = ", ".join(f"{result.gain:+.3f} ± {result.error:.3f}" for result in results)
        means = [np.mean([getattr(result, field) for result in results]) for field in ("cpu", "wall", "memory")]
        print(f"| {title} | {gains} | {means[0]:.0f} | {means[1]:.0f} | {means[2]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
