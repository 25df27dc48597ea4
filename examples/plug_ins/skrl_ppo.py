"""skrl's PPO, with a network of its own, on the vector environment of the mixture model.

    make plug-in-skrl

15 seconds. skrl takes Gymnasium's vector environments, hands them NumPy actions and flattens dictionaries of
observations; lanes have to reset themselves in the same step, and it does not look at `final_obs`.
"""

import argparse

import gymnasium as gym
import numpy as np
import torch
from gymnasium.wrappers.vector import ArrayConversion
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
from skrl.trainers.torch import SequentialTrainer
from skrl.utils import set_seed
from torch import Tensor, nn

import diffusion_gym  # noqa: F401

NUM_STEPS = 3


def network(num_inputs: int, num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(num_inputs, 64), nn.ELU(), nn.Linear(64, num_outputs))


class Actor(GaussianMixin, Model):
    """A Gaussian policy with a learned standard deviation, as in skrl's examples."""

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        Model.__init__(self, observation_space=env.observation_space, action_space=env.action_space, device=env.device)
        GaussianMixin.__init__(self)
        self.net = network(self.num_observations, self.num_actions)
        self.log_std = nn.Parameter(torch.zeros(self.num_actions))

    def compute(self, inputs: dict[str, Tensor], role: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean."""
        return self.net(inputs["observations"]), {"log_std": self.log_std}


class Value(DeterministicMixin, Model):
    """A value function."""

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        Model.__init__(self, observation_space=env.observation_space, action_space=env.action_space, device=env.device)
        DeterministicMixin.__init__(self)
        self.net = network(self.num_observations, 1)

    def compute(self, inputs: dict[str, Tensor], role: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the value."""
        return self.net(inputs["observations"]), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=40)
    args = parser.parse_args()
    set_seed(0)
    lanes = gym.make_vec("DenoisingMDP-v0", num_envs=64, num_steps=NUM_STEPS, model="mixture", reward="brightness")
    env = wrap_env(ArrayConversion(lanes, env_xp=torch, target_xp=np), wrapper="gymnasium")
    agent = PPO(
        models={"policy": Actor(env), "value": Value(env)},
        memory=RandomMemory(memory_size=NUM_STEPS, num_envs=env.num_envs, device=env.device),
        cfg=PPO_CFG(rollouts=NUM_STEPS, discount_factor=1.0, gae_lambda=1.0, learning_rate=3e-3),
        observation_space=env.observation_space,
        action_space=env.action_space,
        device=env.device,
    )
    agent.cfg.experiment.write_interval = agent.cfg.experiment.checkpoint_interval = 0
    rewards: list[float] = []
    record = agent.record_transition

    def watched(**transition: object) -> None:
        """Note what finished images earned."""
        terminated = transition["terminated"]
        if terminated.any():
            rewards.append(transition["rewards"][terminated].mean().item())
        record(**transition)

    agent.record_transition = watched
    SequentialTrainer(env=env, agents=agent, cfg={"timesteps": args.iterations * NUM_STEPS, "headless": True}).train()
    print(f"skrl: brightness {rewards[0]:.4f} -> {rewards[-1]:.4f} in {len(rewards)} rollouts")


if __name__ == "__main__":
    main()
