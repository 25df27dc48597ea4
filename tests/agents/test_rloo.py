import json
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import configure

import diffusion_gym  # noqa: F401
from agents import DDPOSF, RLOO, ContextFreeSchedule, DenoisingPolicy, FixedSchedule, TimePredictor, collect
from agents.advantages import group_advantages, normalise
from agents.experience.rollouts import Rollout
from agents.losses import clipped_surrogate_coefficients, clipped_surrogate_loss
from diffusion_gym.models import load_model
from tests.gradients import assert_gradients_close
from tests.tiny import make_tiny_stable_diffusion

MAX_STEPS = 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_model(make_tiny_stable_diffusion(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture
def time_env(tiny):
    def make(num_envs=4, **arguments):
        arguments = {"reward": "brightness", "autoreset_mode": "DISABLED", "max_steps": MAX_STEPS, **arguments}
        return gym.make_vec("TimePredictionMDP-v0", num_envs=num_envs, model=tiny, **arguments)

    return make


@pytest.fixture
def latent_env(tiny):
    def make(num_envs=4, **arguments):
        arguments = {"reward": "brightness", "autoreset_mode": "DISABLED", "num_steps": 3, **arguments}
        return gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, model=tiny, **arguments)

    return make


def predictor_for(env, seed=0):
    policy = TimePredictor(env.single_observation_space, initial_ratio=0.4, initial_concentration=6, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    policy.output.weight.data = 0.3 * torch.randn(policy.output.weight.shape, generator=generator)
    return policy


def make(time_env, latent_env, kind, **arguments):
    """Return a learner on either environment."""
    if kind == "times":
        env = time_env()
        policy = predictor_for(env)
    else:
        env = latent_env()
        policy = DenoisingPolicy(env.unwrapped.model, use_lora=True, seed=0)
    return RLOO(policy, env, **{"group_size": 2, "seed": 3, "learning_rate": 1e-3, **arguments})


def trained(learner):
    return [parameter for parameter in learner.policy.parameters() if parameter.requires_grad]


def gradients_of(learner, rollout, monkeypatch):
    """Return the gradients of the learner's single update from a rollout."""
    found = []
    step = learner.optimizer_step
    monkeypatch.setattr(
        learner, "optimizer_step", lambda: found.extend(p.grad.clone() for p in trained(learner)) or step()
    )
    metrics = learner.train(rollout)
    return found, metrics


def test_leave_one_out_compares_each_sample_with_the_others():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = [[1 - 4, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3.0]]
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(expected))
    torch.testing.assert_close(group_advantages(torch.randn(5, 7)).sum(1), torch.zeros(5), rtol=0, atol=1e-5)
    for wrong in (torch.ones(3), torch.ones(3, 1)):
        with pytest.raises(ValueError, match="K of at least 2"):
            group_advantages(wrong)


def test_group_relative_advantages_are_grpos():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0], [0.7, 0.7, 0.7]])
    centred = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards, baseline="group_mean"), centred)
    grpo = group_advantages(rewards, baseline="group_mean", scale="group")
    expected = (rewards.numpy() - rewards.numpy().mean(1, keepdims=True))[:2] / rewards.numpy()[:2].std(1)[:, None]
    np.testing.assert_allclose(grpo[:2].numpy(), expected, rtol=1e-3)
    assert grpo[2].abs().max() < 1e-3
    equal = torch.full((2, 12), 50.3)  # whose mean is not 50.3, in float32
    for scale in ("none", "rollout", "group"):
        assert (group_advantages(equal, scale=scale) == 0).all()
    assert (normalise(equal[0]) == 0).all()
    scaled = group_advantages(1e-6 * rewards, baseline="group_mean", scale="group")
    torch.testing.assert_close(scaled, grpo, rtol=1e-3, atol=1e-3)
    assert float(group_advantages(rewards, scale="rollout").std(correction=0)) == pytest.approx(1, rel=1e-5)


def test_coefficients_are_the_derivative_of_the_clipped_surrogate():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(2000, generator=generator)
    log_prob = (old + 0.3 * torch.randn(2000, generator=generator)).requires_grad_()
    advantages = torch.randn(2000, generator=generator)
    (derivative,) = torch.autograd.grad(
        clipped_surrogate_loss(log_prob, old, advantages, clip_range=0.2).sum(), log_prob
    )
    found = clipped_surrogate_coefficients(log_prob.detach(), old, advantages, clip_range=0.2)
    torch.testing.assert_close(found, derivative)
    assert 0.1 < (found == 0).float().mean() < 0.9


@pytest.mark.parametrize("micro_batch_size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("kind", "ratio", "reduction"),
    [("times", "trajectory", "sum"), ("latents", "step", "mean"), ("times", "step", "sum")],
)
def test_first_gradient_is_reinforce_with_the_leave_one_out_baseline(
    time_env, latent_env, monkeypatch, kind, ratio, reduction, micro_batch_size
):
    learner = make(time_env, latent_env, kind, ratio=ratio, micro_batch_size=micro_batch_size)
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
    found, metrics = gradients_of(learner, rollout, monkeypatch)
    assert float(metrics["approx_kl"]) == pytest.approx(0, abs=1e-6)
    assert_gradients_close(found, expected)


@pytest.mark.parametrize(("kind", "clip_range"), [("times", 0.2), ("latents", 0.5)])
def test_two_pass_trajectory_gradient_is_that_of_the_whole_surrogate(
    time_env, latent_env, monkeypatch, kind, clip_range
):
    """After the policy has moved, against one backward pass through everything."""
    learner = make(time_env, latent_env, kind, ratio="trajectory", clip_range=clip_range, micro_batch_size=3)
    rollout = collect(learner.env, learner.policy, seeds=[[5, 5, 9, 9]], reduction="sum")
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(learner):
        scale = 0.1 if kind == "times" else 0.003
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    steps, lanes = (torch.from_numpy(index) for index in np.nonzero(rollout.scored))
    log_probs = learner.policy.log_prob(rollout.observation(steps, lanes), rollout.action(steps, lanes), "sum")
    trajectory = torch.zeros(4).index_add(0, lanes, log_probs)
    advantages = group_advantages(rollout.returns.reshape(2, 2)).flatten()
    ratio = torch.exp(trajectory - rollout.log_probs.sum(0))
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
    assert ((ratio - 1).abs() > 1e-3).all()
    expected = torch.autograd.grad(loss, trained(learner))
    found, metrics = gradients_of(learner, rollout, monkeypatch)
    terms = float((advantages * ratio.detach()).abs().mean())  # the loss is a small difference of these
    assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), abs=5e-3 * terms)
    assert_gradients_close(found, expected)


def test_differences_of_log_probs_are_summed_not_their_sums_subtracted(time_env, latent_env, monkeypatch):
    """A float32 of 3e7 has no digits left for the difference of another step."""
    learner = make(time_env, latent_env, "latents", ratio="trajectory", micro_batch_size=3)
    rollout = collect(learner.env, learner.policy, seeds=[[5, 5, 9, 9]], reduction="sum")
    assert rollout.scored[:2].all()
    shifted = rollout.log_probs + torch.tensor([1e6, 3e7, 0.0])[:, None]
    differences = torch.tensor([2.0**-4, 2.0, 0.0])[:, None]
    moved = shifted + differences
    monkeypatch.setattr(learner.policy.__class__, "log_prob", lambda policy, observation, *_: moved[observation["at"]])
    monkeypatch.setattr(Rollout, "observation", lambda rollout, k, b: {"at": (k, b)})
    advantages, log_ratios = torch.ones(rollout.num_steps, 4), []
    parts = list(rollout.micro_batches(*np.nonzero(rollout.scored), 3))
    sums = {name: torch.zeros(()) for name in ("loss", "approx_kl", "clip_fraction")}
    rollout = replace(rollout, log_probs=shifted)
    learner._trajectory_coefficients(rollout, advantages, np.arange(4), parts, sums, log_ratios)
    torch.testing.assert_close(log_ratios[0], torch.full((4,), 2.0625), rtol=0, atol=0)


@pytest.mark.parametrize("n_epochs", [1, 2])
def test_the_first_update_of_a_rollout_needs_no_pass_for_its_ratios(time_env, latent_env, monkeypatch, n_epochs):
    learner = make(time_env, latent_env, "times", n_epochs=n_epochs, micro_batch_size=1000)
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


def test_what_the_first_update_knows_is_what_a_pass_would_find(time_env, latent_env, monkeypatch):
    learner = make(time_env, latent_env, "times", micro_batch_size=1000)
    rollout = collect(learner.env, learner.policy, seeds=[[5, 5, 9, 9]], reduction="sum")
    monkeypatch.setattr(learner, "optimizer_step", lambda: torch.zeros(()))
    found = []
    for unlearnt in (None, rollout):
        learner._unlearnt = unlearnt
        learner.policy.zero_grad()
        learner.train(rollout)
        found.append([parameter.grad.clone() for parameter in trained(learner)])
    assert learner._unlearnt is None
    largest = max(float(gradient.abs().max()) for gradient in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * largest)


def test_whole_trajectories_of_latents_are_warned_of_beyond_the_first_update(time_env, latent_env):
    with pytest.warns(UserWarning, match="next to 0 or immense after one update, and there are 6 from each rollout"):
        make(time_env, latent_env, "latents", ratio="trajectory", n_epochs=3, batch_size=2)
    make(time_env, latent_env, "latents", ratio="trajectory")
    make(time_env, latent_env, "latents", ratio="step", n_epochs=3)
    make(time_env, latent_env, "times", n_epochs=3)


def test_advantages_are_clipped_as_flow_grpos(time_env, latent_env):
    how = {"baseline": "group_mean", "advantage_scale": "global"}
    learner, free = (make(time_env, latent_env, "times", advantage_clip=clip, **how) for clip in (0.5, None))
    rollout = collect(learner.env, learner.policy, seeds=[[5, 5, 9, 9]])
    rollout = replace(rollout, returns=torch.tensor([0.0, 4, 1, 2]))
    assert free._advantages(rollout).abs().max() > 1
    torch.testing.assert_close(learner._advantages(rollout), free._advantages(rollout).clamp(-0.5, 0.5))


@pytest.mark.parametrize("kl_place", ["exact", "loss", "reward"])
def test_kl_to_the_reference_is_in_closed_form(time_env, latent_env, monkeypatch, kl_place):
    reference = ContextFreeSchedule([0.6] * MAX_STEPS, initial_concentration=20)
    arguments = {"kl_coefficient": 0.3, "kl_place": kl_place, "reference": reference, "micro_batch_size": 3}
    learner = make(time_env, latent_env, "times", **arguments)
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
    if kl_place == "reward":
        returns = returns - 0.3 * torch.zeros(4).index_add(0, lanes, kl.detach())
    advantages = group_advantages(returns.reshape(2, 2)).flatten()
    weights = advantages[lanes]
    if kl_place == "exact":
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
    if kl_place != "reward":
        loss = loss + 0.3 * kl.sum() / 4
    expected = torch.autograd.grad(loss, trained(learner))
    found, metrics = gradients_of(learner, rollout, monkeypatch)
    assert_gradients_close(found, expected)
    assert float(metrics["kl"]) == pytest.approx(float(kl.detach().sum() / 4), rel=1e-4)


@pytest.mark.parametrize("same_noise", [True, False])
def test_groups_share_their_prompt_and_their_noise_if_asked(time_env, latent_env, same_noise):
    learner = make(time_env, latent_env, "times", same_noise=same_noise, samples_per_epoch=8)
    starts = [learner._starts().reset(learner.iteration, batch) for batch in (range(4), range(4, 8))]
    for seed, options in starts:
        observation, info = learner.env.reset(seed=seed, options=options)
        prompts, noise = info["prompt_id"].reshape(2, 2), observation["latents"].reshape(2, 2, -1)
        assert (prompts[:, 0] == prompts[:, 1]).all()
        assert torch.equal(noise[:, 0], noise[:, 1]) == same_noise
        assert not torch.equal(noise[0], noise[1])
        assert min(seed) >= 2**32
    assert starts[0] != starts[1]


def test_starts_can_be_drawn_from_a_few(time_env, latent_env):
    learner = make(time_env, latent_env, "times", num_starts=3)
    seeds = set()
    for learner.iteration in range(30):
        seeds.update(learner._starts().reset(learner.iteration, range(4))[0])
    assert len(seeds) == 3


def test_own_resets_are_refused(tiny, time_env):
    env = time_env(autoreset_mode="SAME_STEP")
    with pytest.raises(ValueError, match='autoreset_mode="DISABLED", got SAME_STEP'):
        RLOO(predictor_for(env), env)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 3}, r"group_size must divide num_envs \(4\), got 3"),
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"batch_size": 3}, r"batch_size must divide samples_per_epoch \(4\), got 3"),
        ({"ratio": "token"}, "ratio must be one of .*got 'token'"),
        ({"n_epochs": 0}, "n_epochs must be an integer of at least 1, got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be an integer of at least 1, got 0"),
        ({"clip_range": 0.0}, "clip_range must be .*, got 0.0"),
        ({"timestep_fraction": 0.5}, 'timestep_fraction and step_weights go with ratio="step"'),
        ({"kl_place": "both"}, "kl_place must be one of .*got 'both'"),
        ({"baseline": "value"}, "baseline must be one of .*got 'value'"),
        ({"advantage_scale": None}, "advantage_scale must be one of .*got None"),
        ({"num_starts": 0}, "num_starts must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named_with_what_is_allowed(time_env, latent_env, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(time_env, latent_env, "times", **arguments)


def test_nothing_to_train_is_named(time_env):
    with pytest.raises(ValueError, match="FixedSchedule has nothing to train"):
        RLOO(FixedSchedule([0.5], max_steps=MAX_STEPS), time_env())


def test_defaults_follow_the_action(time_env, latent_env):
    times, latents = (make(time_env, latent_env, kind) for kind in ("times", "latents"))
    assert (times.ratio, times.clip_range, times.log_prob_reduction) == ("trajectory", 0.2, "sum")
    assert (latents.ratio, latents.clip_range, latents.log_prob_reduction) == ("step", 1e-4, "mean")
    assert make(time_env, latent_env, "latents", ratio="trajectory").log_prob_reduction == "sum"


def test_the_published_settings_are_accepted(latent_env):
    """As RLOO's docstring and the README give them."""
    env = latent_env()
    steps = {"ratio": "step", "clip_range": 1e-4, "group_size": 2}
    grpo = {"baseline": "group_mean", "advantage_clip": 5, "same_noise": False, "kl_coefficient": 0.04 / 3}
    for how in (
        grpo | {"advantage_scale": "global"},
        grpo | {"advantage_scale": "group", "sde_window": 2, "sde_window_range": (0, 2)},
        {"n_epochs": 5, "kl_coefficient": 1e-4},
    ):
        assert RLOO(DenoisingPolicy(env.unwrapped.model, seed=0), env, **steps, **how).ratio == "step"


@pytest.mark.parametrize("kind", ["times", "latents"])
def test_a_loaded_run_goes_on_exactly_where_it_was(time_env, latent_env, tmp_path, kind):
    def weights(learner):
        return [parameter.detach().clone() for parameter in trained(learner)]

    arguments = {"n_epochs": 2, "batch_size": 2, "num_starts": 5, "adam_epsilon": 1e-6}
    whole = make(time_env, latent_env, kind, **arguments).learn(1, log_interval=0)
    whole.learn(1, log_interval=0, reset_num_timesteps=False)
    first = make(time_env, latent_env, kind, **arguments).learn(1, log_interval=0)
    first.save(tmp_path / "run")
    again = RLOO.load(tmp_path / "run", first.env)
    assert type(again.policy) is type(first.policy)
    assert again._hyperparameters == first._hyperparameters
    again.learn(1, log_interval=0, reset_num_timesteps=False)
    assert again.iteration == 2
    assert again.num_timesteps == whole.num_timesteps
    for one, other in zip(weights(whole), weights(again), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="is a run of RLOO, not of DDPOSF"):
        DDPOSF.load(tmp_path / "run", first.env)


def test_a_run_with_a_reference_is_given_it_again(time_env, latent_env, tmp_path):
    reference = ContextFreeSchedule([0.6] * MAX_STEPS)
    learner = make(time_env, latent_env, "times", kl_coefficient=0.1, reference=reference)
    learner.save(tmp_path / "run")
    with pytest.raises(ValueError, match="given to it: give it again, reference="):
        RLOO.load(tmp_path / "run", learner.env)
    assert RLOO.load(tmp_path / "run", learner.env, reference=reference).kl.reference is reference


def test_lengths_are_counted_and_logged(time_env, latent_env, tmp_path):
    learner = make(time_env, latent_env, "times", samples_per_epoch=8)
    learner.set_logger(configure(str(tmp_path), ["json"]))
    learner.learn(1)
    learner.logger.close()
    (line,) = map(json.loads, (tmp_path / "progress.json").read_text().splitlines())
    assert line["rollout/ep_len_mean"] == pytest.approx(learner.num_timesteps / 8)
    assert line["time/total_timesteps"] == learner.num_timesteps < 8 * MAX_STEPS
    for name in ("approx_kl", "clip_fraction", "grad_norm", "loss"):
        assert np.isfinite(line[f"train/{name}"])


@pytest.mark.parametrize("policy", ["predictor", "context_free"])
def test_paid_by_the_step_it_learns_to_take_few(time_env, policy):
    env = time_env(num_envs=16, step_cost="linear", step_cost_weight=1.0)
    if policy == "predictor":
        actor = TimePredictor(env.single_observation_space, initial_ratio=0.4, initial_concentration=8, seed=0)
    else:
        actor = ContextFreeSchedule([0.4] * MAX_STEPS, initial_concentration=8, seed=0)
    seeds = [list(range(start, start + 16)) for start in (0, 16, 32, 48)]
    before = collect(env, actor, seeds=seeds, generators=torch.Generator().manual_seed(0)).lengths.mean()
    RLOO(actor, env, group_size=8, learning_rate=0.03, n_epochs=2, seed=0).learn(1500, log_interval=0)
    after = collect(env, actor, seeds=seeds, generators=torch.Generator().manual_seed(0)).lengths.mean()
    assert before > 5
    assert after < 0.7 * before
