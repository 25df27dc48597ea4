import itertools
import json
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import configure

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DDPOSF, RLOO, ContextFreeSchedule, DenoisingPolicy, collect
from agents.kl import adapted_coefficient, later_kl, later_kl_advantages
from diffusion_gym.models import load_model
from tests.gradients import assert_gradients_close

SGD_LIKE = {"adam_epsilon": 1e-6, "max_grad_norm": None}


@pytest.fixture(scope="module")
def mixture():
    return load_model("mixture")


def latents_env(model, num_envs=8, num_steps=4, **arguments):
    arguments = {"reward": lambda images, prompts, metadata: model.positions(images)[:, 0], **arguments}
    return gym.make_vec(
        "DenoisingMDP-v0", num_envs=num_envs, num_steps=num_steps, model=model, autoreset_mode="DISABLED", **arguments
    )


def times_env(model):
    return gym.make_vec(
        "TimePredictionMDP-v0", num_envs=8, model=model, reward="brightness", autoreset_mode="DISABLED", max_steps=6
    )


def learner_on(model, kind="full", algorithm=RLOO, **arguments):
    """Return a learner with a KL penalty, on the latents (full or LoRA) or on the times."""
    if kind in ("full", "lora"):
        env = latents_env(model)
        policy = DenoisingPolicy(model, use_lora=kind == "lora", seed=0)
    else:
        env = times_env(model)
        policy = ContextFreeSchedule([0.4] * 6, seed=0)
    own = {"group_size": 4} if algorithm is RLOO else {"samples_per_epoch": 8, "per_prompt_buffer_size": None}
    return algorithm(policy, env, **{"kl_coefficient": 0.1, "learning_rate": 3e-3, "seed": 3, **own, **arguments})


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
    ("arguments", "message"),
    [
        ({"kl_coefficient": -0.1}, r"kl_coefficient must be a finite number in \[0, inf\), got -0.1"),
        ({"kl_place": "both"}, "kl_place must be one of .*got 'both'"),
        ({"kl_horizon": 0.5}, r"kl_horizon must be a finite number in \[1, inf\), got 0.5"),
        ({"target_kl": 0.0}, "target_kl must be a finite number"),
        ({"target_kl": 1.0, "kl_coefficient": 0.0}, "has to start above 0; got 1.0 and 0.0"),
        ({"stop_kl": 0.0}, r"stop_kl must be a finite number in \(0, inf\), got 0.0"),
        ({"sde_window": 0}, "at least 1 step and fit into sde_window_range, within the 4 steps"),
        ({"sde_window_range": (0, 2)}, r"sde_window_range needs sde_window, .* got \(0, 2\) and None"),
        ({"kl_coefficient": 0.0, "reference": ContextFreeSchedule([0.5])}, "needs a kl_coefficient above 0, got 0.0"),
        ({"sde_window": 2, "sde_window_range": (3, 4)}, r"got 2 and \(3, 4\)"),
        ({"sde_window": 2, "sde_window_range": (2, 5)}, r"got 2 and \(2, 5\)"),
    ],
)
def test_wrong_arguments_are_named(mixture, arguments, message):
    with pytest.raises(ValueError, match=message):
        learner_on(mixture, **arguments)


@pytest.mark.parametrize(("size", "within"), [(2.5, None), (2, 3), (2, (0, 2.5)), (1, (0, 1, 2)), ("2", None)])
def test_a_window_is_counted_in_steps(mixture, size, within):
    with pytest.raises(TypeError, match=re.escape(f"got {size} and {within}")):
        learner_on(mixture, sde_window=size, sde_window_range=within)


def test_a_reference_is_another_policy(mixture):
    policy = DenoisingPolicy(mixture)
    with pytest.raises(ValueError, match="must not share what is trained"):
        RLOO(policy, latents_env(mixture), kl_coefficient=0.1, reference=policy)
    with pytest.raises(TypeError, match="reference must be a Policy"):
        RLOO(policy, latents_env(mixture), kl_coefficient=0.1, reference="frozen")
    with pytest.raises(ValueError, match="sde_window needs a DenoisingPolicy in DenoisingMDP-v0, got ContextFree"):
        learner_on(mixture, "times", sde_window=2)


@pytest.mark.parametrize("kind", ["full", "lora", "times"])
def test_the_untrained_policy_is_the_reference_if_none_is_given(mixture, kind, tmp_path):
    learner = learner_on(mixture, kind)
    before = [parameter.clone() for parameter in learner.kl.reference.parameters()]
    lines = logged(learner, tmp_path, 3)
    assert abs(lines[0]["train/kl"]) < 1e-6 < 1e-5 < lines[2]["train/kl"]
    for one, other in zip(before, learner.kl.reference.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not other.requires_grad


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_the_reference_of_a_denoiser_costs_no_memory(mixture, use_lora):
    policy = DenoisingPolicy(mixture, use_lora=use_lora, seed=0)
    owned = {id(parameter) for parameter in mixture.denoiser.parameters()}
    assert {id(parameter) for parameter in policy.reference().parameters()} == owned


@pytest.mark.parametrize(
    ("dtype", "mixed_precision", "use_lora"),
    [("float32", "bf16", False), ("float32", "bf16", True), ("bfloat16", "no", False), ("bfloat16", "no", True)],
)
def test_the_reference_computes_as_the_policy_does(tmp_path, dtype, mixed_precision, use_lora):
    from tests.tiny import make_tiny_stable_diffusion

    model = load_model(make_tiny_stable_diffusion(tmp_path / "model"), dtype=dtype)
    policy = DenoisingPolicy(model, mixed_precision=mixed_precision, use_lora=use_lora, seed=0)
    env = latents_env(model, num_envs=2, reward="brightness", dtype=dtype)
    observation, _ = env.reset(seed=0)
    ours, theirs = policy.distribution(observation), policy.reference().distribution(observation)
    assert torch.equal(ours.mean, theirs.mean)


@pytest.mark.parametrize("place", ["exact", "loss", "reward"])
@pytest.mark.parametrize("kind", ["full", "lora", "times"])
def test_a_loaded_run_has_the_first_reference_and_the_adapted_coefficient(mixture, kind, place, tmp_path):
    arguments = {"kl_place": place, "target_kl": 0.01, "kl_horizon": 1.0, "n_epochs": 2, "batch_size": 4, **SGD_LIKE}
    whole, first = (learner_on(mixture, kind, **arguments) for _ in range(2))
    for rollout in range(4):
        whole.learn(1, log_interval=0, reset_num_timesteps=rollout == 0)
        if rollout < 2:
            first.learn(1, log_interval=0, reset_num_timesteps=rollout == 0)
    first.save(tmp_path / "run")
    again = RLOO.load(tmp_path / "run", first.env)
    for one, other in zip(first.kl.reference.parameters(), again.kl.reference.parameters(), strict=True):
        assert torch.equal(one, other)
    for _ in range(2):
        again.learn(1, log_interval=0, reset_num_timesteps=False)
    assert again.kl.coefficient == whole.kl.coefficient != 0.1
    for one, other in zip(weights(whole), weights(again), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["full", "times"])
@pytest.mark.parametrize(
    ("place", "n_epochs", "passes"),
    [("exact", 1, 1), ("exact", 3, 1), ("loss", 1, 1), ("loss", 3, 1), ("reward", 3, 1)],
)
@pytest.mark.parametrize("algorithm", [RLOO, DDPOIS])
def test_the_reference_is_asked_once_for_each_transition(
    mixture, monkeypatch, algorithm, kind, place, n_epochs, passes
):
    arguments = {"kl_place": place, "n_epochs": n_epochs, "batch_size": 4, "micro_batch_size": 5}
    learner = learner_on(mixture, kind, algorithm, **arguments)
    asked, scored = [], []
    distribution, train = type(learner.policy).distribution, learner.train

    def count(policy, observation):
        if policy is learner.kl.reference:
            asked.append(len(observation["timestep"]))
        return distribution(policy, observation)

    monkeypatch.setattr(type(learner.policy), "distribution", count)
    monkeypatch.setattr(learner, "train", lambda rollout: scored.append(rollout.scored.sum()) or train(rollout))
    learner.learn(1, log_interval=0)
    assert sum(asked) == passes * scored[0]


@pytest.mark.parametrize("kind", ["full", "times"])
@pytest.mark.parametrize("place", ["exact", "loss"])
def test_what_is_remembered_of_the_reference_is_what_it_says(mixture, monkeypatch, place, kind):
    """Weights after two rollouts of two passes, with the memory and without it."""
    after = []
    for forget in (False, True):
        learner = learner_on(mixture, kind, kl_place=place, n_epochs=2, batch_size=4, kl_coefficient=5.0)
        if forget:
            monkeypatch.setattr(learner.kl, "remembered", lambda *_, **__: None)
        learner.learn(1, log_interval=0)
        learner.learn(1, log_interval=0, reset_num_timesteps=False)
        after.append(torch.cat([parameter.flatten() for parameter in weights(learner)]))
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-5)


def test_a_policy_that_is_trained_without_guidance_has_two_references(mixture):
    """With train_cfg=False the divergence in the loss is between unguided predictions, the one measured guided."""
    learner = RLOO(
        DenoisingPolicy(mixture, train_cfg=False, guidance_scale=2.0, seed=0),
        latents_env(mixture),
        kl_coefficient=0.1,
        kl_place="exact",
    )
    rollout = collect(learner.env, learner.policy, seeds=[1])
    assert learner.kl.remembered(learner.policy, rollout, passes=2, micro_batch_size=8) is None


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("place", ["exact", "loss", "reward"])
@pytest.mark.parametrize("algorithm", [DDPOSF, DDPOIS])
def test_the_penalty_of_ddpo_is_in_nats_whatever_the_reduction(mixture, monkeypatch, algorithm, place, reduction):
    """Against one backward pass through everything; away from the reference, where the KL has a gradient."""
    arguments = {"advantage_clip": None, "log_prob_reduction": reduction, "batch_size": 8, "micro_batch_size": 5}
    learner = learner_on(mixture, algorithm=algorithm, kl_place=place, **arguments)
    learner.policy.denoiser.last.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(learner, "_advantages", lambda rollout: rollout.returns)
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
    trained = list(learner.policy.parameters())
    expected = torch.autograd.grad(loss / len(k), trained)
    found = []
    step = learner.optimizer_step
    monkeypatch.setattr(learner, "optimizer_step", lambda: found.extend(p.grad.clone() for p in trained) or step())
    metrics = learner.train(rollout)
    assert_gradients_close(found, expected)
    assert float(metrics["kl"]) == pytest.approx(float(kl.detach().sum(0).mean()), rel=1e-3)


def test_a_rollout_is_left_once_the_policy_is_too_far_from_the_one_that_sampled(mixture, tmp_path):
    arguments = {
        "n_epochs": 3,
        "batch_size": 4,
        "learning_rate": 0.03,
        "log_prob_reduction": "sum",
        "clip_range": 100.0,
    }
    (line,) = logged(learner_on(mixture, stop_kl=1e-3, **arguments), tmp_path / "stopped", 1)
    assert 0 < line["train/n_updates"] < 6
    assert line["train/early_stopped"] == 6 - line["train/n_updates"]
    assert line["train/approx_kl"] > 0
    learner = learner_on(mixture, stop_kl=1e9, **arguments)
    (line,) = logged(learner, tmp_path / "whole", 1)
    assert (line["train/n_updates"], line["train/early_stopped"]) == (6, 0)
    assert {parameter.grad for parameter in learner.policy.parameters()} == {None}


def test_an_update_that_is_dropped_changes_nothing(mixture):
    learner = learner_on(mixture, stop_kl=1e-12, batch_size=4)
    rollout = collect(learner.env, learner.policy, seeds=[1])
    learner.policy.denoiser.last.bias.data += 0.1
    before = weights(learner)
    metrics = learner.train(rollout)
    assert (learner.num_updates, float(metrics["early_stopped"])) == (0, 2)
    for one, other in zip(before, learner.policy.parameters(), strict=True):
        assert torch.equal(one, other)
        assert other.grad is None


def test_a_window_of_steps_is_stochastic_and_learnt_from(mixture, monkeypatch):
    learner = learner_on(mixture, kl_coefficient=0.0, sde_window=2, sde_window_range=(0, 4), learning_rate=0.0)
    deterministic = DenoisingPolicy(mixture, eta=0.0)
    rollouts = []
    train = learner.train
    monkeypatch.setattr(learner, "train", lambda rollout: rollouts.append(rollout) or train(rollout))
    learner.learn(12 * 8 * 4, log_interval=0)
    windows = set()
    for rollout in rollouts:
        assert (rollout.scored == rollout.scored[:, :1]).all()
        windows.add(tuple(np.flatnonzero(rollout.scored[:, 0])))
        steps, lanes = (torch.from_numpy(index.ravel()) for index in np.indices(rollout.scored.shape))
        straight = deterministic.act(rollout.observation(steps, lanes))
        away = (rollout.action(steps, lanes) - straight).flatten(1).norm(dim=1)
        assert ((away > 1e-5).numpy() == rollout.scored.ravel()).all()
    assert windows == {(0, 1), (1, 2), (2,)}  # the fourth step goes to the clean end


def test_a_window_needs_a_density(mixture):
    with pytest.raises(
        ValueError, match=r"\(0, 4\) allows a window of 1 steps without a density: steps \[3\] have none"
    ):
        learner_on(mixture, sde_window=1, sde_window_range=(0, 4))


def test_the_ratio_is_one_within_a_window(mixture, tmp_path):
    (line,) = logged(learner_on(mixture, sde_window=2, kl_place="exact"), tmp_path, 1)
    assert line["train/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert line["train/kl"] == pytest.approx(0, abs=1e-6)


def test_a_share_of_the_steps_is_taken_of_those_that_have_a_density(mixture):
    learner = learner_on(mixture, algorithm=DDPOSF, timestep_fraction=0.25, batch_size=2, log_prob_reduction="sum")
    learner.learn(12 * 8 * 4, log_interval=0)  # where it took the last step alone, it raised
    assert learner.num_updates == 48


def test_the_share_of_the_steps_is_that_of_the_window(mixture):
    learner = learner_on(mixture, sde_window=2, timestep_fraction=0.5)
    scored = np.zeros((4, 8), dtype=bool)
    scored[1:3] = True
    steps, lanes = learner._transitions(scored, np.arange(8), np.random.default_rng(0))
    assert sorted(lanes) == list(range(8))
    assert set(steps) == {1, 2}


def test_rloo_learns_from_a_share_of_the_steps(mixture):
    learner = learner_on(mixture, timestep_fraction=0.5)
    steps, lanes = learner._transitions(np.ones((10, 8), dtype=bool), np.arange(8), np.random.default_rng(0))
    for lane in range(8):
        assert len(set(steps[lanes == lane].tolist())) == 5
