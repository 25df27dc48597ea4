"""DPOK, and what it has in common with GRPO."""

import gymnasium as gym
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DPOK, GRPO, KL, DenoisingPolicy, Groups


def make(algorithm, model, **arguments):
    env = gym.make_vec(
        "DenoisingMDP-v0", num_envs=8, num_steps=4, model=model, reward="brightness", autoreset_mode="DISABLED"
    )
    return algorithm(DenoisingPolicy(model, seed=0), env, seed=0, **arguments)


def trained_weights(learner):
    """Return the weights after two rollouts of five passes."""
    learner.learn(2 * 32, log_interval=0)
    assert learner.num_updates == 2 * 5
    return torch.cat([parameter.detach().flatten() for parameter in learner.policy.parameters()])


def test_it_is_grpo_with_its_parts(mixture):
    dpok = trained_weights(make(DPOK, mixture, learning_rate=1e-2))
    parts = {"advantages": Groups(), "kl": KL(0.01 / 100), "n_epochs": 5}
    assert torch.equal(dpok, trained_weights(make(GRPO, mixture, learning_rate=1e-2, **parts)))
    free = {**parts, "kl": None}
    assert not torch.equal(dpok, trained_weights(make(GRPO, mixture, learning_rate=1e-2, **free)))


def test_the_pull_may_be_left_out(mixture):
    learner = make(DPOK, mixture, kl=None)
    learner.learn(1, log_interval=0)
    assert learner.penalty is None


@pytest.mark.parametrize("wrong", [0.0, float("nan")])
def test_a_clip_range_that_is_none_is_named(mixture, wrong):
    with pytest.raises(ValueError, match=f"clip_range must be .*, got {wrong}"):
        make(DPOK, mixture, clip_range=wrong)
