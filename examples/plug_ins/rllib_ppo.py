"""RLlib's PPO, with a network of its own, on the vector environment of the mixture model.

    make plug-in-rllib

A minute. RLlib makes the environment itself, by `gym.make_vec` of an id; it wants NumPy, and lanes that reset
themselves in the *next* step (with any other mode it takes the first transition of each episode for a reset, and says
nothing). So an id is registered whose entry point puts Gymnasium's `ArrayConversion` around the environment.
"""

import argparse

import gymnasium as gym
import numpy as np
import ray
import torch
from gymnasium.wrappers.vector import ArrayConversion, TransformAction
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

import diffusion_gym  # noqa: F401

NUM_STEPS, NUM_ENVS = 3, 32


def numpy_lanes(num_envs: int, **options: object) -> gym.vector.VectorEnv:
    """Return the vector environment as RLlib wants it: of NumPy, with flat actions."""
    env = gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, autoreset_mode="NEXT_STEP", **options)
    shape = env.single_action_space.shape
    flat = gym.spaces.Box(-np.inf, np.inf, (int(np.prod(shape)),), np.float32)
    lanes = ArrayConversion(env, env_xp=torch, target_xp=np)
    return TransformAction(lanes, lambda actions: np.asarray(actions).reshape(-1, *shape), single_action_space=flat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=12)
    args = parser.parse_args()
    gym.register("NumpyDenoisingMDP-v0", vector_entry_point=numpy_lanes)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    config = (
        PPOConfig()
        .environment(
            "NumpyDenoisingMDP-v0",
            env_config={"num_steps": NUM_STEPS, "model": "mixture", "reward": "brightness"},
            normalize_actions=False,
            clip_actions=False,
        )
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=NUM_ENVS,
            gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT,
            env_to_module_connector=lambda env, spaces, device: [FlattenObservations(), MeanStdFilter()],
            batch_mode="complete_episodes",
        )
        .learners(num_learners=0)
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[64]))
        .training(gamma=1.0, lambda_=1.0, lr=3e-3, train_batch_size_per_learner=8 * NUM_ENVS * NUM_STEPS)
        .training(minibatch_size=128, num_epochs=8, vf_clip_param=10.0, entropy_coeff=0.0)
        .debugging(seed=0, log_level="ERROR")
    )
    algorithm = config.build_algo()
    returns, lengths = [], []
    for _ in range(args.iterations):
        found = algorithm.train()["env_runners"]
        returns.append(found["episode_return_mean"])
        lengths.append(found["episode_len_mean"])
    algorithm.stop()
    ray.shutdown()
    assert set(lengths) == {NUM_STEPS}, f"episodes of {NUM_STEPS} steps came as {lengths}"
    print(f"RLlib: brightness {returns[0]:.4f} -> {returns[-1]:.4f} in {len(returns)} iterations")


if __name__ == "__main__":
    main()
