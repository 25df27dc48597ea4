"""RSL-RL's runner, with a network of its own, on the vector environment of the mixture model.

    make plug-in-rsl_rl

15 seconds. The adapter is `RslRlEnv`. Everything stays on the environment's device. RSL-RL never resets: lanes do so
themselves, in the same step; and its random first episode lengths mean nothing here (`init_at_random_ep_len=False`).
"""

import argparse
import tempfile

import gymnasium as gym
import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict
from torch import Tensor

import diffusion_gym  # noqa: F401


class RslRlEnv(VecEnv):
    """A torch vector environment as RSL-RL's: flat actions, one flat group of observations."""

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        base = env.unwrapped
        self.env, self.cfg, self.num_envs, self.device = env, {}, env.num_envs, base.device
        self.num_actions = base.single_action_space.shape[0]
        self.max_episode_length = base.num_steps or base.max_steps
        self.episode_length_buf = torch.zeros(env.num_envs, dtype=torch.long, device=base.device)
        self.returns: list[float] = []
        self._observation = env.reset(seed=0)[0]

    def get_observations(self) -> TensorDict:
        """Return what is observed now."""
        flat = torch.cat([value.flatten(1).float() for value in self._observation.values()], dim=1)
        return TensorDict({"policy": flat}, batch_size=[self.num_envs], device=self.device)

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict]:
        """Take a step."""
        shape = self.env.unwrapped.single_action_space.shape
        self._observation, reward, done, _, info = self.env.step(actions.reshape(-1, *shape))
        self.episode_length_buf = (self.episode_length_buf + 1) * ~done
        if info["ended"].any():
            self.returns.append(reward[done].mean().item())
        return self.get_observations(), reward, done, {"time_outs": torch.zeros_like(done)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    env = RslRlEnv(gym.make_vec("DenoisingMDP-v0", num_envs=64, num_steps=3, model="mixture", reward="brightness"))
    network = {
        "class_name": "rsl_rl.models:MLPModel",
        "hidden_dims": [64],
        "activation": "elu",
        "obs_normalization": True,
    }
    config = {
        "num_steps_per_env": 3,
        "save_interval": 1000,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "algorithm": {"class_name": "rsl_rl.algorithms:PPO", "gamma": 1.0, "lam": 1.0, "entropy_coef": 0.0},
        "actor": {**network, "distribution_cfg": {"class_name": "rsl_rl.modules.distribution:GaussianDistribution"}},
        "critic": network,
    }
    with tempfile.TemporaryDirectory() as folder:
        OnPolicyRunner(env, config, log_dir=folder).learn(args.iterations, init_at_random_ep_len=False)
    print(f"RSL-RL: brightness {env.returns[0]:.4f} -> {env.returns[-1]:.4f} in {len(env.returns)} rollouts")


if __name__ == "__main__":
    main()
