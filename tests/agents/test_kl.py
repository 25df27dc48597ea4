"""A KL divergence that keeps a policy near a frozen one: where it enters the gradient, and how hard it pulls."""

import itertools
import json
from dataclasses import dataclass
from typing import final

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import configure

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    DDPOSF,
    DPOK,
    GRPO,
    KL,
    RLOO,
    AdamW,
    Batch,
    ContextFreeSchedule,
    DenoisingPolicy,
    Full,
    LoRA,
    Rollouts,
    collect,
)
from agents.advantages import Advantages, group_advantages
from agents.kl import KLPenalty, RememberedReference, adapted_coefficient, later_kl, later_kl_advantages
from diffusion_gym.models import load_model
from tests.agents.learners import MAX_STEPS, pairs, trained
from tests.agents.learners import learner_on as rloo_on
from tests.gradients import applied_gradients, assert_gradients_close
from tests.tiny import make_tiny_stable_diffusion

SGD_LIKE = AdamW(weight_decay=0.0, epsilon=1e-6, max_grad_norm=None)
UNCLIPPED = AdamW(weight_decay=0.0, max_grad_norm=None)


@final
@dataclass(frozen=True)
class Raw(Advantages):
    """The rewards themselves."""

    def estimate(self, rewards, memory):
        return rewards.values


def latents_env(model, num_envs=8, num_steps=4, **arguments):
    arguments = {"reward": lambda images, prompts, metadata: model.positions(images)[:, 0], **arguments}
    return gym.make_vec(
        "DenoisingMDP-v0", num_envs=num_envs, num_steps=num_steps, model=model, autoreset_mode="DISABLED", **arguments
    )


def times_env(model):
    return gym.make_vec(
        "TimePredictionMDP-v0", num_envs=8, model=model, reward="brightness", autoreset_mode="DISABLED", max_steps=6
    )


def learner_on(model, kind="full", algorithm=RLOO, *, micro_batch_size=None, **arguments):
    """Return a learner with a KL penalty, on the latents (full or LoRA) or on the times."""
    if kind in ("full", "lora"):
        env = latents_env(model)
        policy = DenoisingPolicy(model, adaptation=LoRA() if kind == "lora" else Full(), seed=0)
    else:
        env = times_env(model)
        policy = ContextFreeSchedule([0.4] * 6, seed=0)
    rollouts = Rollouts(samples=8, group_size=4, same_noise=algorithm is RLOO, micro_batch_size=micro_batch_size)
    own = {} if algorithm in (RLOO, GRPO, DPOK) else {"batch_size": 8, "advantages": Batch()}
    defaults = {"kl": KL(0.1), "learning_rate": 3e-3, "seed": 3, "rollouts": rollouts}
    return algorithm(policy, env, **{**defaults, **own, **arguments})


def logged(learner, folder, rollouts):
    """Return the log's lines of so many rollouts."""
    learner.set_logger(configure(str(folder), ["json"]))
    for rollout in range(rollouts):
        learner.learn(1, reset_num_timesteps=rollout == 0)
    learner.logger.close()
    return [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]


def weights(learner):
    return [parameter.detach().clone() for parameter in learner.policy.parameters()]


def test_later_kl_is_what_comes_after_each_step():
    kl = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    for step, episode in itertools.product(range(5), range(3)):
        assert float(later_kl(kl)[step, episode]) == pytest.approx(float(kl[step + 1 :, episode].sum()), abs=1e-6)
    assert (later_kl(kl)[-1] == 0).all()


def test_later_kl_advantages_compare_an_episode_with_the_others():
    kl = torch.tensor([[9.0, 9, 9], [1, 2, 6], [0, 0, 0]])
    torch.testing.assert_close(later_kl_advantages(kl)[0], torch.tensor([3.0, 1.5, -4.5]))
    assert (later_kl_advantages(kl)[1:] == 0).all()
    assert later_kl_advantages(kl[:, :1])[0] == -1


def test_adaptive_coefficient_is_zieglers():
    def after(kl):
        return adapted_coefficient(2.0, kl, target_kl=0.5, horizon=10)

    assert after(0.5) == 2.0
    assert after(0.55) == pytest.approx(2.0 * 1.01)
    assert after(50.0) == pytest.approx(2.0 * 1.02)
    assert after(0.0) == pytest.approx(2.0 * 0.98)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"coefficient": -0.1}, ValueError, r"coefficient must be a finite number in \(0, inf\), got -0.1"),
        ({"coefficient": 0.0}, ValueError, r"coefficient must be a finite number in \(0, inf\), got 0.0"),
        ({"place": "both"}, ValueError, "place must be one of .*got 'both'"),
        ({"target": 1.0, "horizon": 0.5}, ValueError, r"horizon must be a finite number in \[1, inf\), got 0.5"),
        ({"target": 0.0}, ValueError, "target must be a finite number"),
        ({"horizon": 3.0}, ValueError, "horizon=3.0 has no effect: it needs target"),
        ({"reference": "frozen"}, TypeError, "reference must be a Policy, .* got 'frozen'"),
    ],
)
def test_wrong_values_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        KL(**{"coefficient": 0.1, **arguments})


def test_a_reference_is_another_policy(mixture):
    policy = DenoisingPolicy(mixture)
    with pytest.raises(ValueError, match="must not share what is trained"):
        RLOO(policy, latents_env(mixture), kl=KL(0.1, reference=policy))


def test_a_reference_fits_the_environment(mixture):
    with pytest.raises(ValueError, match="ContextFreeSchedule does not fit the environment"):
        RLOO(DenoisingPolicy(mixture), latents_env(mixture), kl=KL(0.1, reference=ContextFreeSchedule([0.5])))


def test_a_run_with_a_reference_is_given_it_again(mixture, tmp_path):
    reference = ContextFreeSchedule([0.6] * 6)
    learner = learner_on(mixture, "times", kl=KL(0.1, reference=reference))
    learner.save(tmp_path / "run")
    assert not (tmp_path / "run" / "reference").exists()
    with pytest.raises(ValueError, match="given to it: give it again, reference="):
        RLOO.load(tmp_path / "run", learner.env)
    assert RLOO.load(tmp_path / "run", learner.env, reference=reference).penalty.reference is reference
    learner_on(mixture, "times", kl=None).save(tmp_path / "free")
    with pytest.raises(ValueError, match="has no KL divergence: reference= has no effect"):
        RLOO.load(tmp_path / "free", learner.env, reference=reference)


def test_a_coefficient_without_a_target_stays():
    penalty = KLPenalty(ContextFreeSchedule([0.5]), KL(0.1))
    penalty.adapt(50.0)
    assert penalty.coefficient == 0.1
    penalty = KLPenalty(ContextFreeSchedule([0.5]), KL(0.1, target=0.5))
    penalty.adapt(float("nan"))
    assert penalty.coefficient == 0.1
    penalty.adapt(50.0)
    assert penalty.coefficient == pytest.approx(0.1 * 1.02)


@pytest.mark.parametrize("kind", ["full", "lora", "times"])
def test_the_untrained_policy_is_the_reference_if_none_is_given(mixture, kind, tmp_path):
    learner = learner_on(mixture, kind)
    before = [parameter.clone() for parameter in learner.penalty.reference.parameters()]
    lines = logged(learner, tmp_path, 3)
    assert abs(lines[0]["train/kl"]) < 1e-6 < 1e-5 < lines[2]["train/kl"]
    for one, other in zip(before, learner.penalty.reference.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not other.requires_grad


@pytest.mark.parametrize("adaptation", [Full(), LoRA()])
def test_the_reference_of_a_denoiser_costs_no_memory(mixture, adaptation):
    policy = DenoisingPolicy(mixture, adaptation=adaptation, seed=0)
    owned = {id(parameter) for parameter in mixture.denoiser.parameters()}
    assert {id(parameter) for parameter in policy.reference().parameters()} == owned


@pytest.mark.parametrize("adaptation", [Full(), LoRA()])
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "bf16"), ("bfloat16", None)])
def test_the_reference_computes_as_the_policy_does(tmp_path, dtype, precision, adaptation):
    model = load_model(make_tiny_stable_diffusion(tmp_path / "model"), dtype=dtype)
    policy = DenoisingPolicy(model, precision=precision, adaptation=adaptation, seed=0)
    env = latents_env(model, num_envs=2, reward="brightness", dtype=dtype)
    observation, _ = env.reset(seed=0)
    ours, theirs = policy.distribution(observation), policy.reference().distribution(observation)
    assert torch.equal(ours.mean, theirs.mean)


@pytest.mark.parametrize("place", ["exact", "loss", "reward"])
@pytest.mark.parametrize("kind", ["full", "lora", "times"])
def test_a_loaded_run_has_the_first_reference_and_the_adapted_coefficient(mixture, kind, place, tmp_path):
    pull = KL(0.1, place=place, target=0.01, horizon=1.0)
    arguments = {"kl": pull, "n_epochs": 2, "batch_size": 4, "optimizer": SGD_LIKE}
    whole, first = (learner_on(mixture, kind, **arguments) for _ in range(2))
    for rollout in range(4):
        whole.learn(1, log_interval=0, reset_num_timesteps=rollout == 0)
        if rollout < 2:
            first.learn(1, log_interval=0, reset_num_timesteps=rollout == 0)
    first.save(tmp_path / "run")
    again = RLOO.load(tmp_path / "run", first.env)
    for one, other in zip(first.penalty.reference.parameters(), again.penalty.reference.parameters(), strict=True):
        assert torch.equal(one, other)
    for _ in range(2):
        again.learn(1, log_interval=0, reset_num_timesteps=False)
    assert again.penalty.coefficient == whole.penalty.coefficient != 0.1
    for one, other in zip(weights(whole), weights(again), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["full", "times"])
@pytest.mark.parametrize(
    ("place", "n_epochs", "passes"),
    [("exact", 1, 1), ("exact", 3, 1), ("loss", 1, 1), ("loss", 3, 1), ("reward", 3, 1)],
)
@pytest.mark.parametrize("algorithm", [RLOO, DDPOIS, GRPO])
def test_the_reference_is_asked_once_for_each_transition(
    mixture, monkeypatch, algorithm, kind, place, n_epochs, passes
):
    arguments = {"kl": KL(0.1, place=place), "n_epochs": n_epochs, "batch_size": 4, "micro_batch_size": 5}
    learner = learner_on(mixture, kind, algorithm, **arguments)
    asked, scored = [], []
    distribution, train = type(learner.policy).distribution, learner.train

    def count(policy, observation):
        if policy is learner.penalty.reference:
            asked.append(len(observation["timestep"]))
        return distribution(policy, observation)

    monkeypatch.setattr(type(learner.policy), "distribution", count)
    monkeypatch.setattr(learner, "train", lambda rollout: scored.append(rollout.scored.sum()) or train(rollout))
    learner.learn(1, log_interval=0)
    assert sum(asked) == passes * scored[0]


@pytest.mark.parametrize("kind", ["full", "times"])
@pytest.mark.parametrize("place", ["exact", "loss", "reward"])
def test_what_is_remembered_of_the_reference_is_what_it_says(mixture, place, kind):
    learner = learner_on(mixture, kind, kl=KL(0.1, place=place))
    rollout = collect(learner.env, learner.policy, seeds=[1], reduction=learner.reduction)
    remembered = RememberedReference(learner.penalty.reference, rollout, 5)
    steps, lanes = (torch.from_numpy(index) for index in np.nonzero(rollout.scored))
    observation = rollout.observation(steps, lanes)
    distribution = learner.policy.distribution(observation)
    found = learner.penalty.divergence(distribution, observation, remembered.at(steps, lanes))
    torch.testing.assert_close(found, learner.penalty.divergence(distribution, observation), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("place", ["exact", "loss", "reward"])
@pytest.mark.parametrize("algorithm", [DDPOSF, DDPOIS, GRPO])
def test_the_penalty_is_in_nats_whatever_the_reduction(mixture, algorithm, place, reduction):
    """Against one backward pass through everything; away from the reference, where the KL has a gradient."""
    arguments = {"advantages": Raw(), "log_prob_reduction": reduction, "batch_size": 8, "micro_batch_size": 5}
    learner = learner_on(mixture, algorithm=algorithm, kl=KL(0.1, place=place), optimizer=UNCLIPPED, **arguments)
    learner.policy.denoiser.last.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    rollout = collect(learner.env, learner.policy, seeds=[1], reduction=reduction)
    k, b = (torch.from_numpy(index) for index in np.nonzero(rollout.scored))
    observation = rollout.observation(k, b)
    distribution = learner.policy.distribution(observation)
    reference = DenoisingPolicy(mixture).distribution(observation)
    away = (distribution.mean - reference.mean.detach()).flatten(1).square().sum(1)
    kl = torch.zeros(rollout.scored.shape).index_put((k, b), away / (2 * distribution.std**2))
    advantages = rollout.returns.expand(rollout.scored.shape)
    if place == "reward":
        advantages = advantages - 0.1 * kl.detach().sum(0)
    if place == "exact":
        later = torch.stack([kl[step + 1 :].detach().sum(0) for step in range(len(kl))])
        advantages = advantages - 0.1 * (later - (later.sum(1, keepdim=True) - later) / 7)
    loss = -(advantages[k, b] * distribution.log_prob(rollout.action(k, b), reduction)).sum()
    if place != "reward":
        loss = loss + 0.1 * kl.sum() / (2 if reduction == "mean" else 1)
    expected = torch.autograd.grad(loss / len(k), trained(learner))
    applied = applied_gradients(learner)
    metrics = learner.train(rollout)
    (found,) = applied
    assert_gradients_close(found, expected)
    assert float(metrics["kl"]) == pytest.approx(float(kl.detach().sum(0).mean()), rel=1e-3)


@pytest.mark.parametrize("place", ["exact", "loss", "reward"])
def test_the_penalty_of_times_is_in_closed_form(tiny, place):
    """Of whole trajectories, against torch's KL divergence of Beta distributions."""
    reference = ContextFreeSchedule([0.6] * MAX_STEPS, initial_concentration=20)
    pull = KL(0.3, place=place, reference=reference)
    learner = rloo_on(tiny, "times", kl=pull, rollouts=pairs(micro_batch_size=3), optimizer=UNCLIPPED)
    rollout = collect(learner.env, learner.policy, seeds=[[5, 5, 9, 9]], reduction="sum")
    steps, lanes = (torch.from_numpy(index) for index in np.nonzero(rollout.scored))
    observation = rollout.observation(steps, lanes)
    distribution = learner.policy.distribution(observation)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Beta(distribution.alpha, distribution.beta),
        torch.distributions.Beta(torch.tensor(18 * 0.6 + 1), torch.tensor(18 * 0.4 + 1)),
    )
    log_prob = distribution.log_prob(rollout.action(steps, lanes))
    returns = rollout.returns
    if place == "reward":
        returns = returns - 0.3 * torch.zeros(4).index_add(0, lanes, kl.detach())
    advantages = group_advantages(returns.reshape(2, 2)).flatten()
    weights = advantages[lanes]
    if place == "exact":
        later = torch.tensor(
            [
                float(kl[(lanes == lane) & (steps > step)].detach().sum())
                for step, lane in zip(steps, lanes, strict=True)
            ]
        )
        table = torch.zeros(rollout.num_steps, 4).index_put((steps, lanes), later)
        others = (table.sum(1, keepdim=True) - table) / 3
        weights = weights - 0.3 * (table - others)[steps, lanes]
    loss = -(weights * log_prob).sum() / 4
    if place != "reward":
        loss = loss + 0.3 * kl.sum() / 4
    expected = torch.autograd.grad(loss, trained(learner))
    applied = applied_gradients(learner)
    metrics = learner.train(rollout)
    (found,) = applied
    assert_gradients_close(found, expected)
    assert float(metrics["kl"]) == pytest.approx(float(kl.detach().sum() / 4), rel=1e-4)
