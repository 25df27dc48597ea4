"""Which prompts a training draws: at random, by weight, or in turn, one by one or in groups."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DenoisingPolicy, Rollouts, collect
from agents.experience.starts import Starts

PROMPTS = ["anything", "east", "west", "north", "south"]


def make(model, *, prompts=PROMPTS, num_envs=4):
    return gym.make_vec(
        "DenoisingMDP-v0", num_envs=num_envs, num_steps=1, model=model, prompts=prompts, reward="brightness"
    )


def prompts_of(env, *, iterations, samples=4, seed=0, **fields):
    """Return the prompts of a run's rollouts, [iterations, samples]."""
    starts = Starts(env.unwrapped.prompts, seed, samples, Rollouts(samples=samples, **fields))
    batches = [range(first, first + env.num_envs) for first in range(0, samples, env.num_envs)]
    drawn = []
    for iteration in range(iterations):
        resets = [starts.reset(iteration, batch) for batch in batches]
        infos = [env.reset(seed=seeds, options=options)[1] for seeds, options in resets]
        drawn.append(np.concatenate([info["prompt_id"] for info in infos]))
    return np.array(drawn)


@pytest.mark.parametrize("group_size", [1, 2])
def test_prompts_take_turns_in_groups(mixture, group_size):
    """Each pass over the prompts has each once, in an order of its own, across batches and rollouts."""
    env = make(mixture)
    fields = {"group_size": group_size, "prompt_sampling": "round_robin", "samples": 8}
    drawn = prompts_of(env, iterations=10, **fields)
    groups = drawn.reshape(-1, group_size)
    assert (groups == groups[:, :1]).all()
    passes = groups[:, 0].reshape(-1, len(PROMPTS)).tolist()
    assert all(sorted(one) == list(range(len(PROMPTS))) for one in passes)
    assert len({tuple(one) for one in passes}) > 3
    np.testing.assert_array_equal(prompts_of(env, iterations=10, **fields), drawn)
    assert not np.array_equal(prompts_of(env, iterations=10, seed=1, **fields), drawn)


def test_groups_of_one_noise_take_turns_with_it(mixture):
    """RLOO's default: the samples of a group share prompt and noise."""
    env = make(mixture)
    fields = {"group_size": 2, "same_noise": True, "prompt_sampling": "round_robin"}
    drawn = prompts_of(env, iterations=5, **fields)
    assert sorted(drawn[:, ::2].ravel().tolist()) == sorted([*range(len(PROMPTS))] * 2)
    assert (drawn[:, ::2] == drawn[:, 1::2]).all()
    seeds, options = Starts(env.unwrapped.prompts, 0, 4, Rollouts(**fields)).reset(0, range(4))
    noise = env.reset(seed=seeds, options=options)[0]["latents"]
    assert torch.equal(noise[::2], noise[1::2])
    assert not torch.equal(noise[0], noise[2])


@pytest.mark.parametrize("same_noise", [True, False])
def test_so_many_starts_come_again(mixture, same_noise):
    """Prompt and noise of each group are one of three; with `same_noise` its samples share the noise too."""
    env = make(mixture)
    starts = Starts(env.unwrapped.prompts, 0, 4, Rollouts(group_size=2, same_noise=same_noise, num_starts=3))
    found = set()
    for iteration in range(10):
        seeds, options = starts.reset(iteration, range(4))
        observation, info = env.reset(seed=seeds, options=options)
        assert (info["prompt_id"][::2] == info["prompt_id"][1::2]).all()
        noise = observation["latents"].flatten(1)[:, 0].tolist()
        assert (noise[0] == noise[1]) == same_noise
        found |= {(noise[lane], noise[lane + 1], int(info["prompt_id"][lane])) for lane in (0, 2)}
    assert len(found) == 3


def test_starts_depend_on_the_episodes_alone(mixture):
    """Whole groups, in one reset or in several, begin alike."""
    prompts = make(mixture).unwrapped.prompts
    for fields in ({}, {"group_size": 2}, {"group_size": 2, "same_noise": True}, {"prompt_sampling": "round_robin"}):
        starts = Starts(prompts, 0, 8, Rollouts(**fields))
        seeds, options = starts.reset(3, range(8))
        halves = [starts.reset(3, range(first, first + 4)) for first in (0, 4)]
        assert [seed for half, _ in halves for seed in half] == seeds
        if options is not None:
            assert [index for _, half in halves for index in half["prompt_id"]] == options["prompt_id"]


@pytest.mark.parametrize("group_size", [1, 2])
def test_prompts_are_drawn_by_their_weights(mixture, group_size):
    weighted = dict.fromkeys(PROMPTS, 0.0) | {"east": 3.0, "west": 1.0}
    env = make(mixture, prompts=weighted, num_envs=20)
    drawn = prompts_of(env, iterations=20, samples=20, group_size=group_size)
    shares = np.bincount(drawn.ravel(), minlength=len(PROMPTS)) / drawn.size
    np.testing.assert_allclose(shares, [0, 0.75, 0.25, 0, 0], atol=0.07)


def test_a_rollout_has_the_prompts_that_its_resets_were_given(mixture):
    env = make(mixture)
    starts = Starts(env.unwrapped.prompts, 0, 8, Rollouts(group_size=2, prompt_sampling="round_robin"))
    resets = [starts.reset(2, range(first, first + 4)) for first in (0, 4)]
    rollout = collect(
        env, DenoisingPolicy(mixture), seeds=[seeds for seeds, _ in resets], options=[options for _, options in resets]
    )
    assert rollout.prompt_id.tolist() == [index for _, options in resets for index in options["prompt_id"]]


def test_weights_that_a_sampling_ignores_are_said(mixture):
    env = make(mixture, prompts={"east": 3.0, "west": 1.0})
    rollouts = Rollouts(samples=4, prompt_sampling="round_robin")
    with pytest.warns(UserWarning, match="the weights that prompts have are not looked at"):
        DDPOIS(DenoisingPolicy(mixture), env, rollouts=rollouts, batch_size=4)
