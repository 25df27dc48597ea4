"""Which prompts a training draws: at random, by weight, or in turn, one by one or in groups."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DDPOIS, RLOO, DenoisingPolicy
from diffusion_gym.models import load_model

PROMPTS = ["anything", "east", "west", "north", "south"]


@pytest.fixture(scope="module")
def mixture():
    return load_model("mixture")


def prompts_of(model, algorithm=DDPOIS, *, iterations, prompts=PROMPTS, num_envs=4, **arguments):
    """Return the prompts of a short training's rollouts, [iterations, samples_per_epoch]."""
    env = gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, num_steps=1, model=model, prompts=prompts,
                       reward=lambda images, *_: images.mean((1, 2, 3)), autoreset_mode="DISABLED")  # fmt: skip
    options = {"samples_per_epoch": num_envs, "learning_rate": 0.0, "seed": 0, **arguments}
    options["batch_size"] = options["samples_per_epoch"]
    learner = algorithm(DenoisingPolicy(model, seed=0), env, **options)
    learner.train = lambda rollout: drawn.append(rollout.prompt_id) or {}
    drawn = []
    learner.learn(iterations * learner.samples_per_epoch, log_interval=0)
    return np.array(drawn)


@pytest.mark.parametrize(("algorithm", "group_size"), [(DDPOIS, 1), (DDPOIS, 2), (RLOO, 2)])
def test_prompts_take_turns_in_groups(mixture, algorithm, group_size):
    """Each pass over the prompts has each once, in an order of its own, across batches and rollouts."""
    arguments = {"group_size": group_size, "prompt_sampling": "round_robin", "samples_per_epoch": 8}
    drawn = prompts_of(mixture, algorithm, iterations=10, **arguments)
    groups = drawn.reshape(-1, group_size)
    assert (groups == groups[:, :1]).all()
    passes = groups[:, 0].reshape(-1, len(PROMPTS)).tolist()
    assert all(sorted(one) == list(range(len(PROMPTS))) for one in passes)
    assert len({tuple(one) for one in passes}) > 3
    again = prompts_of(mixture, algorithm, iterations=10, **arguments)
    np.testing.assert_array_equal(again, drawn)
    assert not np.array_equal(prompts_of(mixture, algorithm, iterations=10, **{**arguments, "seed": 1}), drawn)


def test_groups_of_one_noise_take_turns_with_it(mixture):
    """RLOO's default: the samples of a group share prompt and noise."""
    drawn = prompts_of(mixture, RLOO, iterations=5, num_envs=4, group_size=2, same_noise=True,
                       prompt_sampling="round_robin")  # fmt: skip
    assert sorted(drawn[:, ::2].ravel().tolist()) == sorted([*range(len(PROMPTS))] * 2)
    assert (drawn[:, ::2] == drawn[:, 1::2]).all()
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, model=mixture, autoreset_mode="DISABLED")
    learner = RLOO(DenoisingPolicy(mixture), env, group_size=2, same_noise=True, prompt_sampling="round_robin")
    seeds, options = learner._starts().reset(0, range(4))
    noise = env.reset(seed=seeds, options=options)[0]["latents"]
    assert torch.equal(noise[::2], noise[1::2])
    assert not torch.equal(noise[0], noise[2])
    with pytest.raises(ValueError, match="num_starts draws prompt and noise together"):
        prompts_of(mixture, RLOO, iterations=1, group_size=2, num_starts=3, prompt_sampling="round_robin")


@pytest.mark.parametrize("group_size", [1, 2])
def test_prompts_are_drawn_by_their_weights(mixture, group_size):
    weighted = dict.fromkeys(PROMPTS, 0.0) | {"east": 3.0, "west": 1.0}
    drawn = prompts_of(mixture, iterations=20, prompts=weighted, num_envs=20, group_size=group_size)
    shares = np.bincount(drawn.ravel(), minlength=len(PROMPTS)) / drawn.size
    np.testing.assert_allclose(shares, [0, 0.75, 0.25, 0, 0], atol=0.07)


def test_another_sampling_is_refused(mixture):
    with pytest.raises(ValueError, match="prompt_sampling must be one of"):
        prompts_of(mixture, iterations=1, prompt_sampling="in turn")


def test_weights_that_a_sampling_ignores_are_said(mixture):
    with pytest.warns(UserWarning, match="the weights that prompts have are not looked at"):
        prompts_of(mixture, iterations=1, prompts={"east": 3.0, "west": 1.0}, prompt_sampling="round_robin")
