"""DDPO's two estimators."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DDPOSF, AdamW, Batch, DenoisingPolicy, LoRA, PerPrompt, Rollouts, collect
from tests.gradients import applied_gradients, assert_gradients_close

ALGORITHMS = [DDPOSF, DDPOIS]


def make(algorithm, model, *, micro_batch_size=None, samples=4, **arguments):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=3, model=model, reward="brightness")
    rollouts = Rollouts(samples=samples, micro_batch_size=micro_batch_size)
    return algorithm(
        DenoisingPolicy(model, adaptation=LoRA(), seed=0),
        env,
        **{"rollouts": rollouts, "batch_size": 2, "learning_rate": 1e-4, "seed": 3, **arguments},
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("micro_batch_size", [None, 1, 5])
def test_first_gradient_is_the_policy_gradient(tiny, algorithm, micro_batch_size):
    """−1/(B·T) Σ_b A_b Σ_t ∇ log π, against a loop over single transitions."""
    how = {"batch_size": 4, "advantages": Batch(), "optimizer": AdamW(max_grad_norm=None)}
    learner = make(algorithm, tiny, micro_batch_size=micro_batch_size, **how)
    rollout = collect(learner.env, learner.policy, seeds=[0])
    advantages = (rollout.returns - rollout.returns.mean()) / (rollout.returns.std(correction=0) + 1e-6)
    parameters = [p for p in learner.policy.parameters() if p.requires_grad]
    expected = [torch.zeros_like(p) for p in parameters]
    num_terms = rollout.scored.sum()
    for step, lane in zip(*np.nonzero(rollout.scored), strict=True):
        k, b = torch.tensor([step]), torch.tensor([lane])
        log_prob = learner.policy.log_prob(rollout.observation(k, b), rollout.action(k, b), "mean")
        for total, gradient in zip(expected, torch.autograd.grad(log_prob.sum(), parameters), strict=True):
            total -= advantages[lane] * gradient / num_terms
    applied = applied_gradients(learner)
    learner.train(rollout)
    (found,) = applied
    assert_gradients_close(found, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ratio_is_one_and_nothing_is_clipped_before_the_first_update(tiny, algorithm):
    learner = make(algorithm, tiny, learning_rate=0.0, samples=8, batch_size=4)
    learner.learn(8 * 3, log_interval=0)
    metrics = learner.train(collect(learner.env, learner.policy, seeds=[1, 2]))
    assert float(metrics["approx_kl"]) < 1e-9
    if algorithm is DDPOIS:
        assert float(metrics["clip_fraction"]) == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_defaults_are_the_papers(algorithm):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=64, model="mixture")
    learner = algorithm(DenoisingPolicy(env.unwrapped.model), env)
    assert (learner.sizes.samples, learner.n_epochs, learner.learning_rate) == (256, 1, 1e-5)
    assert learner.sizes.batch == (64 if algorithm is DDPOIS else 256)
    assert learner.advantages == PerPrompt(16, clip=5.0)
    assert (learner.ratio_of, learner.reduction) == ("step", "mean")


@pytest.mark.parametrize("wrong", [0.0, -1e-4, float("nan"), float("inf")])
def test_a_clip_range_that_is_none_is_named(tiny, wrong):
    with pytest.raises(ValueError, match=f"clip_range must be .*, got {wrong}"):
        make(DDPOIS, tiny, clip_range=wrong)
