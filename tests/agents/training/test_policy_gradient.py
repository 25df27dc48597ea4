"""The update loop that all policy-gradient algorithms share."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    DDPOSF,
    GRPO,
    RLOO,
    AdamW,
    Batch,
    DenoisingPolicy,
    Groups,
    PerPrompt,
    PromptMeans,
    Rollout,
    Rollouts,
    TimePredictor,
    collect,
)
from agents.advantages import PerPromptStats, group_advantages, grouped_by_prompt, normalise
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import write_mixture
from tests.agents.learners import learner_on, pairs, trained
from tests.gradients import applied_gradients, assert_gradients_close

UNCLIPPED = AdamW(weight_decay=0.0, max_grad_norm=None)


def make(algorithm, model, *, num_envs=8, num_steps=4, **arguments):
    def position(images, prompts, metadata):
        return model.positions(images)[:, 0]

    env = gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, num_steps=num_steps, model=model, reward=position)
    sizes = {"rollouts": Rollouts(samples=num_envs, group_size=4), "batch_size": num_envs}
    return algorithm(DenoisingPolicy(model, seed=0), env, **{**sizes, "seed": 3, **arguments})


def transitions(rollout):
    return tuple(torch.from_numpy(index) for index in np.nonzero(rollout.scored))


def moved(learner, scale):
    """Move a learner's policy away from the one that sampled."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(learner):
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


# Advantages are a part


@pytest.mark.parametrize(
    ("algorithm", "part", "by_hand"),
    [
        (DDPOIS, Groups(), lambda rewards, *_: group_advantages(rewards.reshape(2, 4)).flatten()),
        (DDPOSF, PromptMeans(), lambda rewards, prompts, _: grouped_by_prompt(rewards, prompts)),
        (
            RLOO,
            PerPrompt(8, 2, clip=0.7),
            lambda rewards, _, texts: torch.from_numpy(
                PerPromptStats(8, 2).update(texts, rewards.tolist()).clip(-0.7, 0.7)
            ),
        ),
        (GRPO, Batch(clip=None), lambda rewards, *_: normalise(rewards)),
    ],
)
def test_each_algorithms_advantages_can_be_exchanged(mixture, algorithm, part, by_hand):
    """What multiplies ∇ log π in the first update is what the part says, by hand."""
    learner = make(algorithm, mixture, advantages=part, optimizer=UNCLIPPED)
    rollout = collect(learner.env, learner.policy, seeds=[[1, 2, 3, 4] * 2], options={"prompt_id": [0] * 4 + [1] * 4})
    prompts = learner.env.unwrapped.prompts
    advantages = by_hand(rollout.returns, rollout.prompt_id, [prompts[index] for index in rollout.prompt_id])
    steps, lanes = transitions(rollout)
    log_prob = learner.policy.log_prob(rollout.observation(steps, lanes), rollout.action(steps, lanes), "mean")
    expected = torch.autograd.grad(-(advantages[lanes] * log_prob).mean(), trained(learner))
    applied = applied_gradients(learner)
    learner.train(rollout)
    (found,) = applied
    assert_gradients_close(found, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"advantages": "batch"}, TypeError, "advantages must be a part, such as .* got 'batch'"),
        ({"stop_kl": 0.0}, ValueError, r"stop_kl must be a finite number in \(0, inf\), got 0.0"),
        (
            {"advantages": Groups(), "rollouts": Rollouts(samples=8)},
            ValueError,
            r"Groups\(…\) compares the episodes of a prompt: group_size must be at least 2, got 1",
        ),
    ],
)
def test_wrong_arguments_are_named(mixture, arguments, error, message):
    with pytest.raises(error, match=message):
        make(DDPOIS, mixture, **arguments)


# Ratios of whole trajectories


@pytest.mark.parametrize(("kind", "clip_range"), [("times", 0.2), ("latents", 0.5)])
def test_two_pass_trajectory_gradient_is_that_of_the_whole_surrogate(tiny, kind, clip_range):
    """After the policy has moved, against one backward pass through everything."""
    how = {"ratio": "trajectory", "clip_range": clip_range, "rollouts": pairs(micro_batch_size=3)}
    learner = learner_on(tiny, kind, optimizer=UNCLIPPED, **how)
    rollout = collect(learner.env, learner.policy, seeds=[[5, 5, 9, 9]], reduction="sum")
    moved(learner, 0.1 if kind == "times" else 0.003)
    steps, lanes = transitions(rollout)
    log_probs = learner.policy.log_prob(rollout.observation(steps, lanes), rollout.action(steps, lanes), "sum")
    trajectory = torch.zeros(4).index_add(0, lanes, log_probs)
    advantages = group_advantages(rollout.returns.reshape(2, 2)).flatten()
    ratio = torch.exp(trajectory - rollout.log_probs.sum(0))
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
    assert ((ratio - 1).abs() > 1e-3).all()
    expected = torch.autograd.grad(loss, trained(learner))
    applied = applied_gradients(learner)
    metrics = learner.train(rollout)
    terms = float((advantages * ratio.detach()).abs().mean())  # the loss is a small difference of these
    assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), abs=5e-3 * terms)
    (found,) = applied
    assert_gradients_close(found, expected)


@pytest.mark.parametrize("away", [0.0, 0.03])
def test_a_trajectory_of_one_step_is_a_step(tmp_path, away):
    """On a process whose last step has a density; before and after the policy has moved."""
    noisy = {"num_train_timesteps": 4, "trained_betas": [0.1, 0.4, 0.6, 0.9]}
    process = {**noisy, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
    means = [[-1.0, 0.0], [1.0, 0.5]]
    model = load_model(
        write_mixture(tmp_path / "plane", means, stds=[0.4, 0.6], names=["left", "right"], scheduler=process)
    )
    found = []
    for ratio in ("step", "trajectory"):
        how = {"ratio": ratio, "log_prob_reduction": "sum", "clip_range": 0.2, "optimizer": UNCLIPPED}
        learner = make(RLOO, model, num_steps=1, **how)
        rollout = collect(learner.env, learner.policy, seeds=[0], reduction="sum")
        assert rollout.scored.shape == (1, 8)
        assert rollout.scored.all()
        moved(learner, away)
        applied = applied_gradients(learner)
        metrics = learner.train(rollout)
        found.append((applied[0], metrics))
    (of_steps, of_step), (of_trajectories, of_trajectory) = found
    assert away == 0 or 0 < float(of_step["clip_fraction"]) < 1
    assert_gradients_close(of_trajectories, of_steps, share=1e-5)
    for name in ("loss", "approx_kl", "clip_fraction", "ratio_min", "ratio_max"):
        assert float(of_trajectory[name]) == pytest.approx(float(of_step[name]), rel=1e-4, abs=1e-6), name


def test_differences_of_log_probs_are_summed_not_their_sums_subtracted(tiny, monkeypatch):
    """A float32 of 3e7 has no digits left for the difference of another step."""
    learner = learner_on(tiny, "latents", ratio="trajectory", rollouts=pairs(micro_batch_size=3))
    rollout = collect(learner.env, learner.policy, seeds=[[5, 5, 9, 9]], reduction="sum")
    assert rollout.scored[:2].all()
    shifted = rollout.log_probs + torch.tensor([1e6, 3e7, 0.0])[:, None]
    now = shifted + torch.tensor([2.0**-4, 2.0, 0.0])[:, None]

    class Density:
        def __init__(self, observation):
            self.log_probs = now[observation["at"]] + 0 * trained(learner)[0].sum()

        def log_prob(self, action, reduction):
            return self.log_probs

    monkeypatch.setattr(DenoisingPolicy, "distribution", lambda policy, observation: Density(observation))
    monkeypatch.setattr(Rollout, "observation", lambda rollout, k, b: {"at": (k, b)})
    metrics = learner.train(replace(rollout, log_probs=shifted))
    for name in ("ratio_min", "ratio_max"):
        assert float(metrics[name]) == pytest.approx(math.exp(2.0625), rel=1e-6)


@pytest.mark.parametrize("n_epochs", [1, 2])
def test_the_first_update_of_a_rollout_needs_no_pass_for_its_ratios(tiny, monkeypatch, n_epochs):
    learner = learner_on(tiny, "times", n_epochs=n_epochs, rollouts=pairs(micro_batch_size=1000))
    asked, distribution = [], TimePredictor.distribution
    monkeypatch.setattr(
        TimePredictor,
        "distribution",
        lambda policy, observation: asked.append(torch.is_grad_enabled()) or distribution(policy, observation),
    )
    train = learner.train
    monkeypatch.setattr(learner, "train", lambda rollout: asked.clear() or train(rollout))
    learner.learn(1, log_interval=0)
    assert asked == [True] + [False, True] * (n_epochs - 1)


def test_what_the_first_update_knows_is_what_a_pass_would_find(tiny):
    """Learning twice from a rollout, without moving: the second time the ratios are asked for."""
    learner = learner_on(tiny, "times", learning_rate=0.0, optimizer=UNCLIPPED, rollouts=pairs(micro_batch_size=1000))
    applied, train = applied_gradients(learner), learner.train
    learner.train = lambda rollout: (train(rollout), train(rollout))[1]
    learner.learn(1, log_interval=0)
    known, asked = applied
    assert_gradients_close(asked, known, share=1e-4)


# Far from the policy that sampled


def test_a_rollout_is_left_once_the_policy_is_too_far_from_the_one_that_sampled(mixture):
    how = {"n_epochs": 3, "batch_size": 4, "learning_rate": 0.03, "log_prob_reduction": "sum", "clip_range": 100.0}
    learner = make(RLOO, mixture, stop_kl=1e-3, **how)
    metrics = learner.train(collect(learner.env, learner.policy, seeds=[1], reduction="sum"))
    assert 0 < learner.num_updates < 6
    assert float(metrics["early_stopped"]) == 6 - learner.num_updates
    assert float(metrics["approx_kl"]) > 0
    learner = make(RLOO, mixture, stop_kl=1e9, **how)
    metrics = learner.train(collect(learner.env, learner.policy, seeds=[1], reduction="sum"))
    assert (learner.num_updates, float(metrics["early_stopped"])) == (6, 0)
    assert {parameter.grad for parameter in learner.policy.parameters()} == {None}


def test_an_update_that_is_dropped_changes_nothing(mixture):
    learner = make(RLOO, mixture, stop_kl=1e-12, batch_size=4)
    rollout = collect(learner.env, learner.policy, seeds=[1])
    learner.policy.denoiser.last.bias.data += 0.1
    before = [parameter.detach().clone() for parameter in learner.policy.parameters()]
    metrics = learner.train(rollout)
    assert (learner.num_updates, float(metrics["early_stopped"])) == (0, 2)
    for one, other in zip(before, learner.policy.parameters(), strict=True):
        assert torch.equal(one, other)
        assert other.grad is None


# Runs


@pytest.mark.parametrize("part", [PerPrompt(8, 1, center=True), Groups("group_mean", scale="group")])
@pytest.mark.parametrize("algorithm", [DDPOSF, DDPOIS, RLOO, GRPO])
def test_a_loaded_run_goes_on_exactly_where_it_was(mixture, tmp_path, algorithm, part):
    """What was remembered of prompts too."""

    def start():
        return make(algorithm, mixture, advantages=part, batch_size=4, learning_rate=1e-2)

    def weights(learner):
        return torch.cat([parameter.detach().flatten() for parameter in trained(learner)])

    whole, first = start().learn(3 * 32, log_interval=0), start().learn(32, log_interval=0)
    first.save(tmp_path / "run")
    second = algorithm.load(tmp_path / "run", first.env)
    assert torch.equal(weights(first), weights(second))
    second.learn(2 * 32, log_interval=0, reset_num_timesteps=False)
    assert (second.num_timesteps, second.iteration, second.num_updates) == (96, 3, 6)
    assert torch.equal(weights(whole), weights(second))
