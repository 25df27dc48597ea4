"""GRPO, and what it has in common with RLOO."""

import gymnasium as gym
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import GRPO, KL, RLOO, AdamW, DenoisingPolicy, Groups, Rollouts, Steps, Window, collect


def make_env(model):
    return gym.make_vec(
        "DenoisingMDP-v0", num_envs=8, num_steps=4, model=model, reward="brightness", autoreset_mode="DISABLED"
    )


def make(algorithm, model, **arguments):
    return algorithm(DenoisingPolicy(model, seed=0), make_env(model), seed=0, **arguments)


def trained_weights(learner):
    """Return the weights after three rollouts of two passes."""
    learner.learn(3 * 32, log_interval=0)
    assert learner.num_updates == 3 * 2 * 2
    return torch.cat([parameter.detach().flatten() for parameter in learner.policy.parameters()])


@pytest.mark.parametrize("same_noise", [True, False])
def test_with_rloos_advantages_and_settings_it_is_rloo(mixture, same_noise):
    given = {
        "learning_rate": 1e-2,
        "n_epochs": 2,
        "batch_size": 4,
        "clip_range": 1e-2,
        "optimizer": AdamW(weight_decay=0.0),
        "rollouts": Rollouts(group_size=4, same_noise=same_noise),
        "kl": KL(0.1),
    }
    advantages = Groups("leave_one_out", scale="none", clip=None)
    grpo = trained_weights(make(GRPO, mixture, advantages=advantages, **given))
    assert torch.equal(grpo, trained_weights(make(RLOO, mixture, **given)))
    assert not torch.equal(grpo, trained_weights(make(GRPO, mixture, **given)))


def test_advantages_are_flow_grpos(mixture):
    """(R − mean of the group) / (std of all rewards), within ±5."""
    learner = make(GRPO, mixture)
    rollout = collect(learner.env, learner.policy, seeds=[0])
    groups = rollout.returns.reshape(2, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / rollout.returns.std(correction=0)
    torch.testing.assert_close(learner.advantages_of(rollout), expected.flatten(), rtol=1e-4, atol=1e-4)


def test_the_published_settings_are_accepted(mixture):
    """As its docstring gives them."""
    pull = KL(0.04 / 4)
    for how in (
        {"kl": pull},
        {"kl": pull, "steps": Steps(window=Window(2))},
        {"advantages": Groups("group_mean", scale="group")},
    ):
        learner = make(GRPO, mixture, **how)
        assert (learner.ratio_of, learner.reduction, learner.sizes.group) == ("step", "mean", 4)


@pytest.mark.parametrize("wrong", [0.0, float("nan")])
def test_a_clip_range_that_is_none_is_named(mixture, wrong):
    with pytest.raises(ValueError, match=f"clip_range must be .*, got {wrong}"):
        make(GRPO, mixture, clip_range=wrong)
