"""The episodes of a group begin with one prompt, and with one noise if asked."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import Rollouts
from agents.experience.starts import Starts


def make_env(model, num_envs=4):
    prompts = ["north", "south", "east", "west", "anything"]
    return gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, num_steps=2, model=model, prompts=prompts)


def starts_in(env, num_episodes=8, **rollouts):
    return Starts(
        prompts=env.unwrapped.prompts, seed=3, num_episodes=num_episodes, rollouts=Rollouts(group_size=2, **rollouts)
    )


@pytest.mark.parametrize("same_noise", [True, False])
def test_groups_share_their_prompt_and_their_noise_if_asked(mixture, same_noise):
    env = make_env(mixture)
    starts = [starts_in(env, same_noise=same_noise).reset(0, batch) for batch in (range(4), range(4, 8))]
    for seed, options in starts:
        observation, info = env.reset(seed=seed, options=options)
        prompts, noise = info["prompt_id"].reshape(2, 2), observation["latents"].reshape(2, 2, -1)
        assert (prompts[:, 0] == prompts[:, 1]).all()
        assert torch.equal(noise[:, 0], noise[:, 1]) == same_noise
        assert not torch.equal(noise[0], noise[1])
        assert min(seed) >= 2**32
    assert starts[0] != starts[1]


def test_groups_have_prompts_and_noises_of_their_own(mixture):
    env = make_env(mixture, num_envs=16)
    starts = starts_in(env, num_episodes=16)
    seed, options = starts.reset(0, range(16))
    observation, info = env.reset(seed=seed, options=options)
    groups = info["prompt_id"].reshape(8, 2)
    assert len(set(groups[:, 0])) > 1
    assert len(torch.unique(observation["latents"].flatten(1), dim=0)) == 16
    assert not np.array_equal(starts.reset(1, range(16))[1]["prompt_id"], info["prompt_id"])


def test_starts_can_be_drawn_from_a_few(mixture):
    starts = starts_in(make_env(mixture), same_noise=True, num_starts=3)
    assert len({seed for iteration in range(30) for seed in starts.reset(iteration, range(4))[0]}) == 3
