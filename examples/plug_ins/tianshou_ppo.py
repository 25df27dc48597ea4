"""Tianshou's PPO, with a network of its own, on single environments of the mixture model.

    make plug-in-tianshou

30 seconds. Tianshou batches single environments itself and takes no vector environment: each has its lane alone, and
nothing is computed together. They share one model, so memory does not grow with their number.
"""

import argparse
import logging

import gymnasium as gym
import numpy as np
import torch
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
from torch.distributions import Independent, Normal

import diffusion_gym  # noqa: F401
from diffusion_gym.models import load_model

NUM_STEPS, NUM_ENVS = 3, 16


def make_env(model: object) -> gym.Env:
    """Return one environment with flat observations and actions, the observations of about unit size."""
    env = gym.make("DenoisingMDP-v0", num_steps=NUM_STEPS, model=model, reward="brightness")
    flat = gym.wrappers.FlattenObservation(env)
    small = gym.wrappers.TransformObservation(flat, lambda seen: np.clip(seen, -3, 3), flat.observation_space)
    space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    return gym.wrappers.TransformAction(small, lambda action: action.reshape(env.action_space.shape), space)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=20)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    torch.manual_seed(0)
    model = load_model("mixture")
    envs = DummyVectorEnv([lambda: make_env(model) for _ in range(NUM_ENVS)])
    envs.seed(0)
    example = make_env(model)
    actor = ContinuousActorProbabilistic(
        preprocess_net=Net(state_shape=example.observation_space.shape, hidden_sizes=[64]),
        action_shape=example.action_space.shape,
        unbounded=True,
    )
    critic = ContinuousCritic(preprocess_net=Net(state_shape=example.observation_space.shape, hidden_sizes=[64]))
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=lambda parameters: Independent(Normal(*parameters), 1),
        action_space=example.action_space,
        action_scaling=False,
        action_bound_method=None,
    )
    algorithm = PPO(
        policy=policy, critic=critic, optim=AdamOptimizerFactory(lr=3e-3), gamma=1.0, gae_lambda=1.0, ent_coef=0.0
    )
    collector = Collector(algorithm, envs, VectorReplayBuffer(4 * NUM_ENVS * NUM_STEPS, NUM_ENVS))
    rewards: list[float] = []

    collect = collector.collect

    def watched(**arguments: object) -> object:
        """Collect, and note what the episodes returned."""
        stats = collect(**arguments)
        rewards.append(stats.returns_stat.mean)
        return stats

    collector.collect = watched
    episodes = 4 * NUM_ENVS
    algorithm.run_training(
        OnPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=args.iterations * episodes * NUM_STEPS,
            collection_step_num_env_steps=None,
            collection_step_num_episodes=episodes,
            update_step_num_repetitions=4,
            batch_size=64,
            verbose=False,
            show_progress=False,
        )
    )
    print(f"Tianshou: brightness {rewards[0]:.4f} -> {rewards[-1]:.4f} in {len(rewards)} rollouts")


if __name__ == "__main__":
    main()
