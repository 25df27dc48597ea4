import gymnasium as gym
import pytest

import diffusion_gym  # noqa: F401


@pytest.fixture
def make_env(emoji):
    def make(num_envs=4, num_steps=3, **arguments):
        arguments = {"model": emoji, "reward": "brightness", **arguments}
        return gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, num_steps=num_steps, **arguments)

    return make
