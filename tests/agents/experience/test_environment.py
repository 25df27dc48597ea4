"""The one place where agents take an environment, and a policy beside it."""

import gymnasium as gym
import pytest
import torch
from gymnasium.wrappers.vector import TransformReward

import diffusion_gym  # noqa: F401
from agents import ContextFreeSchedule, DenoisingPolicy, FixedSchedule
from agents.experience.environment import check_fit, torch_env


@pytest.mark.parametrize(
    ("env_id", "steps", "large", "moves_latents"),
    [
        ("DenoisingMDP-v0", {"num_steps": 3}, {"latents"}, True),
        ("TimePredictionMDP-v0", {"max_steps": 3}, {"latents", "features", "time_embedding"}, False),
    ],
)
def test_the_environment_below_its_wrappers_says_what_it_is(mixture, env_id, steps, large, moves_latents):
    env = gym.make_vec(env_id, num_envs=2, model=mixture, reward="brightness", **steps)
    below = torch_env(TransformReward(env, lambda rewards: rewards))
    assert below is env.unwrapped
    assert {name: getattr(below, name) for name in ("num_steps", "max_steps")} == dict.fromkeys(
        ("num_steps", "max_steps")
    ) | steps
    assert below.large_keys == large
    assert below.constant_keys == {"prompt_id", "prompt_embeds", "negative_prompt_embeds"}
    assert below.action_is_next_latents is moves_latents


@pytest.mark.parametrize("other", [None, "DenoisingMDP-v0", object()])
def test_what_is_no_environment_is_refused(other):
    with pytest.raises(TypeError, match="env must be a torch vector environment"):
        torch_env(other)


def test_other_environments_are_refused(mixture):
    for other in (gym.make_vec("CartPole-v1", num_envs=2), gym.make("DenoisingMDP-v0", model=mixture)):
        with pytest.raises(TypeError, match=r"env must be a torch vector environment: gym\.make_vec"):
            torch_env(other)


def test_a_policy_of_other_steps_does_not_fit(mixture):
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model=mixture, max_steps=3)
    check_fit(env, ContextFreeSchedule([0.5] * 3))
    check_fit(env, FixedSchedule([0.5], max_steps=3))
    for policy in (ContextFreeSchedule([0.5] * 4), FixedSchedule([0.5] * 2)):
        with pytest.raises(ValueError, match=f"at most {policy.max_steps} steps, the env's have 3"):
            check_fit(env, policy)


def test_a_policy_of_another_device_does_not_fit(mixture):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, model=mixture)
    policy = DenoisingPolicy(mixture)
    for same in ("cpu", "cpu:0"):
        policy.device = torch.device(same)
        check_fit(env, policy)
    policy.device = torch.device("meta")
    with pytest.raises(ValueError, match="the policy is on meta, the environment on cpu"):
        check_fit(env, policy)
