"""`check_vector_env` refuses environments that break the contract, each in one way."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorWrapper

import diffusion_gym  # noqa: F401
from diffusion_gym.testing import check_vector_env


class ReusesABuffer(VectorWrapper):
    def reset(self, **options):
        observation, info = super().reset(**options)
        self.buffer = observation["latents"].clone()
        return observation | {"latents": self.buffer}, info

    def step(self, actions):
        observation, *rest = super().step(actions)
        self.buffer.copy_(observation["latents"])
        return observation | {"latents": self.buffer}, *rest


class ChangesTheAction(VectorWrapper):
    def step(self, actions):
        result = super().step(actions)
        actions.zero_()
        return result


class ReturnsTheAction(VectorWrapper):
    def step(self, actions):
        observation, *rest = super().step(actions)
        return observation | {"latents": actions}, *rest


class IgnoresTheSeed(VectorWrapper):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=3, options=options)


class ForgetsTheMask(VectorWrapper):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed, options={})


class LiesAboutTheEnd(VectorWrapper):
    def step(self, actions):
        *rest, info = super().step(actions)
        return *rest, info | {"ended": np.zeros_like(info["ended"])}


class PaysInFloat64(VectorWrapper):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        return observation, reward.double(), *rest


class SaysBytesAreInPlaceOfNumbers(VectorWrapper):
    def __init__(self, env):
        super().__init__(env)
        self.single_observation_space = Dict(
            {**env.single_observation_space, "latents": Box(0, 255, (2, 1, 1), np.uint8)}
        )


BROKEN = {
    ReusesABuffer: "'latents' was changed after it was returned",
    ChangesTheAction: "must not change the caller's action",
    ReturnsTheAction: "'latents' shares memory with the action",
    IgnoresTheSeed: "seed=s must seed lane i with s \\+ i|another seed must give another observation",
    ForgetsTheMask: "of a lane outside the mask was changed",
    LiesAboutTheEnd: "must say which lanes ended",
    PaysInFloat64: "the reward must be float32, got torch.float64",
    SaysBytesAreInPlaceOfNumbers: "'latents' must be of kind 'u', got torch.float32",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda kind: kind.__name__)
def test_broken_environments_are_refused(broken):
    env = gym.make_vec(
        "DenoisingMDP-v0", num_envs=3, model="mixture", num_steps=2, autoreset_mode=AutoresetMode.DISABLED
    )
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        check_vector_env(broken(env), max_steps=5)


def test_episodes_have_to_end():
    env = gym.make_vec("DenoisingMDP-v0", num_envs=3, model="mixture", num_steps=5)
    with pytest.raises(AssertionError, match="no episode ended within 3 steps"):
        check_vector_env(env, max_steps=3)


def test_the_environment_behind_an_idle_wrapper_passes():
    check_vector_env(VectorWrapper(gym.make_vec("DenoisingMDP-v0", num_envs=3, model="mixture", num_steps=2)))
