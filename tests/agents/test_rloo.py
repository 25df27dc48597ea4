"""RLOO, of whole trajectories and of steps."""

import numpy as np
import pytest
import torch

from agents import (
    RLOO,
    AdamW,
    ContextFreeSchedule,
    DenoisingPolicy,
    FixedSchedule,
    Groups,
    LoRA,
    Rollouts,
    Steps,
    TimePredictor,
    collect,
)
from tests.agents.learners import MAX_STEPS, latent_env, learner_on, pairs, predictor_for, time_env, trained
from tests.gradients import applied_gradients, assert_gradients_close


@pytest.mark.parametrize("micro_batch_size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("kind", "ratio", "reduction"),
    [("times", "trajectory", "sum"), ("latents", "step", "mean"), ("times", "step", "sum")],
)
def test_first_gradient_is_reinforce_with_the_leave_one_out_baseline(tiny, kind, ratio, reduction, micro_batch_size):
    rollouts = pairs(micro_batch_size=micro_batch_size)
    optimizer = AdamW(weight_decay=0.0, max_grad_norm=None)
    learner = learner_on(tiny, kind, ratio=ratio, rollouts=rollouts, optimizer=optimizer)
    rollout = collect(learner.env, learner.policy, seeds=[[5, 5, 9, 9]], reduction=reduction)
    returns = rollout.returns.tolist()
    advantages = [returns[0] - returns[1], returns[1] - returns[0], returns[2] - returns[3], returns[3] - returns[2]]
    expected = [torch.zeros_like(parameter) for parameter in trained(learner)]
    terms = 4 if ratio == "trajectory" else int(rollout.scored.sum())
    for lane in range(4):
        for step in np.flatnonzero(rollout.scored[:, lane]):
            k, b = torch.tensor([step]), torch.tensor([lane])
            log_prob = learner.policy.log_prob(rollout.observation(k, b), rollout.action(k, b), reduction)
            for total, gradient in zip(expected, torch.autograd.grad(log_prob.sum(), trained(learner)), strict=True):
                total -= advantages[lane] * gradient / terms
    applied = applied_gradients(learner)
    metrics = learner.train(rollout)
    assert float(metrics["approx_kl"]) == pytest.approx(0, abs=1e-6)
    (found,) = applied
    assert_gradients_close(found, expected)


def test_whole_trajectories_of_latents_are_warned_of_beyond_the_first_update(tiny):
    with pytest.warns(UserWarning, match="next to 0 or immense after one update, and there are 6 from each rollout"):
        learner_on(tiny, "latents", ratio="trajectory", n_epochs=3, batch_size=2)
    learner_on(tiny, "latents", ratio="trajectory")
    learner_on(tiny, "latents", ratio="step", n_epochs=3)
    learner_on(tiny, "times", n_epochs=3)


def test_own_resets_are_refused_where_episodes_differ_in_length(tiny):
    env = time_env(tiny, autoreset_mode="SAME_STEP")
    with pytest.raises(ValueError, match='autoreset_mode="DISABLED", got SAME_STEP'):
        RLOO(predictor_for(env), env)
    env = latent_env(tiny, autoreset_mode="NEXT_STEP")
    RLOO(DenoisingPolicy(tiny, adaptation=LoRA()), env)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rollouts": Rollouts(group_size=3)}, r"group_size must divide num_envs \(4\), got 3"),
        ({"rollouts": Rollouts(group_size=1)}, "group_size must be at least 2"),
        ({"batch_size": 3}, r"batch_size must divide the rollout's samples \(4\), got 3"),
        ({"ratio": "token"}, "ratio must be None or one of .*got 'token'"),
        ({"n_epochs": 0}, "n_epochs must be an integer of at least 1, got 0"),
        ({"clip_range": 0.0}, "clip_range must be .*, got 0.0"),
        ({"steps": Steps(fraction=0.5)}, r'Steps\(fraction=…, weights=…\) go with ratio="step".*got 0.5 and \'equal\''),
    ],
)
def test_wrong_arguments_are_named_with_what_is_allowed(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        learner_on(tiny, "times", **arguments)


def test_weights_of_steps_go_with_the_ratio_of_steps(tiny):
    with pytest.raises(ValueError, match=r'go with ratio="step".* got 1\.0 and \'inverse_sensitivity\''):
        learner_on(tiny, "latents", ratio="trajectory", steps=Steps(weights="inverse_sensitivity"))


def test_nothing_to_train_is_named(tiny):
    with pytest.raises(ValueError, match="FixedSchedule has nothing to train"):
        RLOO(FixedSchedule([0.5], max_steps=MAX_STEPS), time_env(tiny))


@pytest.mark.parametrize(
    ("kind", "ratio", "expected"),
    [
        ("times", None, ("trajectory", "sum", 0.2)),
        ("times", "step", ("step", "sum", 1e-4)),
        ("latents", None, ("step", "mean", 1e-4)),
        ("latents", "trajectory", ("trajectory", "sum", 0.2)),
    ],
)
def test_defaults_follow_the_action(tiny, kind, ratio, expected):
    """The clip is at the log-ratio up to which the surrogate has a gradient."""
    learner = learner_on(tiny, kind, ratio=ratio)
    assert (learner.ratio_of, learner.reduction) == expected[:2]
    log_ratio = torch.tensor([0.99, 1.01], dtype=torch.float64).mul(expected[2]).log1p()
    coefficient = learner.surrogate(log_ratio, torch.zeros_like(log_ratio), torch.ones_like(log_ratio)).coefficient
    assert (coefficient != 0).tolist() == [True, False]


def test_defaults_are_those_of_heads_and_lora(tiny):
    env = time_env(tiny)
    learner = RLOO(predictor_for(env), env)
    assert (learner.learning_rate, learner.optimizer, learner.advantages) == (1e-4, AdamW(weight_decay=0.0), Groups())
    assert learner.rollouts == Rollouts(group_size=4, same_noise=True)


@pytest.mark.parametrize("policy", ["predictor", "context_free"])
def test_paid_by_the_step_it_learns_to_take_few(tiny, policy):
    env = time_env(tiny, num_envs=16, step_cost="linear", step_cost_weight=1.0)
    if policy == "predictor":
        actor = TimePredictor(env.single_observation_space, initial_ratio=0.4, initial_concentration=8, seed=0)
    else:
        actor = ContextFreeSchedule([0.4] * MAX_STEPS, initial_concentration=8, seed=0)
    seeds = [list(range(start, start + 16)) for start in (0, 16, 32, 48)]
    before = collect(env, actor, seeds=seeds, generators=torch.Generator().manual_seed(0)).lengths.mean()
    rollouts = Rollouts(group_size=8, same_noise=True)
    RLOO(actor, env, rollouts=rollouts, learning_rate=0.03, n_epochs=2, seed=0).learn(1500, log_interval=0)
    after = collect(env, actor, seeds=seeds, generators=torch.Generator().manual_seed(0)).lengths.mean()
    assert before > 5
    assert after < 0.7 * before
