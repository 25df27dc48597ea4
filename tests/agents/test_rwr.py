"""Reward-weighted regression: weights, the update, and what it converges to."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import RWR, AdamW, Best, DenoisingPolicy, Noising, Replay, Rollouts, Softmax, collect, evaluate
from agents.logs.diagnostics import effective_sample_size
from agents.rwr import best_weights, softmax_weights
from tests.gradients import applied_gradients, assert_gradients_close


def make_env(model, num_envs=8, **arguments):
    arguments = {"num_steps": 3, "reward": "brightness", **arguments}
    return gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, model=model, **arguments)


def replay_of(rewards, prompts=None):
    """Return samples with these rewards, all of one prompt unless said otherwise."""
    prompts = np.zeros(len(rewards), dtype=np.int64) if prompts is None else prompts
    return Replay(latents=torch.zeros(len(rewards), 1, 1, 1), constants={}, rewards=rewards, prompts=prompts)


def test_softmax_weights_are_the_published_ones():
    """jannerm/ddpo, array.py: softmax(β·r) times the number of samples, of all or of each prompt's."""
    rewards = torch.tensor([1.0, 2.0, 4.0, 0.5])
    expected = np.exp(0.2 * rewards.numpy())
    np.testing.assert_allclose(
        softmax_weights(rewards, inverse_temperature=0.2).numpy(), 4 * expected / expected.sum(), rtol=1e-5
    )
    grouped = softmax_weights(rewards, inverse_temperature=0.2, groups=np.array([7, 3, 7, 3]))
    for rows in ([0, 2], [1, 3]):
        np.testing.assert_allclose(grouped[rows].numpy(), 2 * expected[rows] / expected[rows].sum(), rtol=1e-5)


def test_the_best_share_is_kept():
    rewards = torch.arange(20.0)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    weights = best_weights(rewards, share=0.1)
    assert sorted(rewards[weights > 0].tolist()) == [18, 19]
    assert best_weights(rewards, share=1.0).sum() == 20
    assert best_weights(rewards[:3], share=0.1).sum() == 1
    grouped = best_weights(torch.tensor([1.0, 2.0, 3.0, 4.0]), share=0.5, groups=np.array([0, 0, 1, 1]))
    assert grouped.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("good", "share", "kept"), [(1, 0.1, 3), (3, 0.1, 3), (0, 0.25, 8), (32, 0.25, 8), (9, 0.1, 3)]
)
def test_of_equally_good_samples_about_the_share_is_kept(good, share, kept):
    rewards = torch.zeros(32)
    rewards[:good] = 1
    weights = best_weights(rewards, share=share)
    assert int(weights.sum()) == kept
    assert int(weights[:good].sum()) == min(good, kept)
    assert torch.equal(weights, best_weights(rewards, share=share))


def test_equally_good_samples_are_kept_evenly():
    """Not the first ones: these are of the first prompts of a rollout."""
    for share in (1 / 4, 1 / 8):
        kept = best_weights(torch.full((64,), 2.5), share=share).reshape(4, 16).sum(1)
        assert ((kept - 16 * share).abs() <= 1).all()


def test_parts_weigh_as_the_functions_do():
    rewards, prompts = torch.tensor([1.0, 2.0, 4.0, 0.5]), np.array([7, 3, 7, 3])
    replay = replay_of(rewards, prompts)
    scores = (rewards - rewards.mean()) / rewards.std(correction=0)
    for groups in (None, prompts):
        how = {"per_prompt": groups is not None}
        expected = softmax_weights(rewards, inverse_temperature=0.2, groups=groups)
        assert torch.equal(Softmax(0.2, normalise=False, **how).of(replay), expected)
        expected = softmax_weights(scores, inverse_temperature=0.2, groups=groups)
        torch.testing.assert_close(Softmax(0.2, **how).of(replay), expected)
        assert torch.equal(Best(0.5, **how).of(replay), best_weights(rewards, share=0.5, groups=groups))


def test_rewards_that_differ_by_rounding_alone_weigh_alike():
    noise = 1e-6 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Softmax(5.0).of(replay_of(21.3 + noise)), torch.ones(8))
    assert Softmax(5.0).of(replay_of(21.3 + 1e4 * noise)).max() > 2


@pytest.mark.parametrize("part", [Softmax(per_prompt=True), Best(0.5, per_prompt=True)])
def test_a_prompt_that_is_drawn_once_is_warned_of(part):
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="its weight is 1, whatever its reward"):
        assert torch.equal(part.of(replay_of(rewards, np.arange(8))), torch.ones(8))
    share = 0.5 if isinstance(part, Best) else 1
    assert part.of(replay_of(rewards, np.arange(8) // 2)).sum() == pytest.approx(8 * share)


@pytest.mark.parametrize(("draws", "passes"), [(1, [3, 1]), (2, [3, 3, 2])])
def test_the_update_is_weighted_regression_on_noised_images(tiny, monkeypatch, draws, passes):
    """Against the loss written out, with the same times and noises."""
    env = make_env(tiny, num_envs=4)
    policy = DenoisingPolicy(tiny, guidance_scale=2.0, seed=0)
    parts = {"rollouts": Rollouts(micro_batch_size=3), "noising": Noising(draws=draws), "weights": Softmax(0.7)}
    learner = RWR(policy, env, n_epochs=1, learning_rate=0.0, optimizer=AdamW(max_grad_norm=None), seed=0, **parts)
    rollout = collect(env, policy, seeds=[0])
    drawn = []
    original = policy.predict_noised

    def remember(clean, t, noise, constants, *, guidance_scale):
        drawn.append((clean, t, noise, constants))
        return original(clean, t, noise, constants, guidance_scale=guidance_scale)

    monkeypatch.setattr(policy, "predict_noised", remember)
    applied = applied_gradients(learner)
    metrics = learner.train(rollout)
    scores = (rollout.returns - rollout.returns.mean()) / rollout.returns.std(correction=0)
    weights = 4 * torch.softmax(0.7 * scores, 0)
    total = 0.0
    ends = rollout.actions[-1]
    for clean, t, noise, constants in drawn:
        rows = [int((ends == one).flatten(1).all(1).nonzero()) for one in clean]
        bar = tiny.schedule.alphas_cumprod[t.long()].float()[:, None, None, None]
        noised = bar.sqrt() * clean + (1 - bar).sqrt() * noise
        outputs = [
            policy.denoiser(noised, t, encoder_hidden_states=constants[key]).sample
            for key in ("negative_prompt_embeds", "prompt_embeds")
        ]
        guided = outputs[0] + 2.0 * (outputs[1] - outputs[0])
        total = total + (weights[rows] * (guided - noise).square().mean((1, 2, 3))).sum() / (4 * draws)
    expected = torch.autograd.grad(total, list(policy.parameters()))
    assert [len(clean) for clean, *_ in drawn] == passes
    assert len(set(torch.cat([t for _, t, *_ in drawn]).tolist())) == 4 * draws
    assert float(metrics["loss"]) == pytest.approx(float(total.detach()), rel=1e-4)
    assert float(metrics["effective_sample_size"]) == pytest.approx(float(effective_sample_size(weights)), rel=1e-4)
    (found,) = applied
    assert_gradients_close(found, expected)


@pytest.mark.parametrize("part", [Softmax(0.7, normalise=False), Best(0.25)])
def test_it_regresses_to_the_tilted_mixture(line, part, monkeypatch):
    """One round on 8,192 samples, against the tilted law (or the best quarter) of those samples themselves."""
    env = make_env(
        line, 1024, num_steps=30, reward=lambda images, *_: line.positions(images)[:, 0], prompts=["anything"]
    )
    policy = DenoisingPolicy(line, seed=0)
    sizes = {"rollouts": Rollouts(samples=8192), "batch_size": 512, "n_epochs": 60}
    learner = RWR(policy, env, learning_rate=3e-3, weights=part, seed=0, **sizes)
    seen = []
    fit = learner.fit
    monkeypatch.setattr(learner, "fit", lambda replay: seen.append(replay.rewards) or fit(replay))
    learner.learn(1, log_interval=0)
    x = seen[0].double()
    weights = best_weights(x, share=0.25) if isinstance(part, Best) else torch.exp(0.7 * x)
    expected_mean = float((weights * x).sum() / weights.sum())
    expected_share = float((weights * (x > 0)).sum() / weights.sum())
    after = evaluate(env, policy, seeds=range(4096), prompts=["anything"] * 4096)
    assert float(x.mean()) == pytest.approx(0.0, abs=0.05)
    assert expected_mean > 0.5
    assert after.mean == pytest.approx(expected_mean, abs=0.12)
    assert (after.rewards > 0).mean() == pytest.approx(expected_share, abs=0.05)


def test_samples_of_no_weight_are_not_looked_at(line, monkeypatch):
    learner = RWR(DenoisingPolicy(line, seed=0), make_env(line), weights=Best(0.25), n_epochs=1, seed=0)
    asked, predict = [], DenoisingPolicy.predict_noised
    monkeypatch.setattr(
        DenoisingPolicy,
        "predict_noised",
        lambda policy, clean, *r, **k: asked.append(clean) or predict(policy, clean, *r, **k),
    )
    rollout = collect(learner.env, learner.policy, seeds=[0])
    learner.train(rollout)
    best = rollout.returns.topk(2).indices
    assert {float(one) for one in torch.cat(asked)} == {float(one) for one in rollout.ends[best]}


def test_an_interrupted_run_goes_on_bit_for_bit(line, tmp_path):
    def make():
        parts = {"weights": Best(0.5), "noising": Noising(draws=2, time_range=(0.5, 1.0), common=True)}
        return RWR(DenoisingPolicy(line, seed=0), make_env(line, 16), learning_rate=1e-2, batch_size=8, seed=3, **parts)

    whole = make()
    whole.learn(4 * 48, log_interval=0)
    half = make()
    half.learn(2 * 48, log_interval=0)
    half.save(tmp_path / "run")
    again = RWR.load(tmp_path / "run", make_env(line, 16))
    assert (again.weights, again.noising) == (half.weights, half.noising)
    again.learn(2 * 48, log_interval=0, reset_num_timesteps=False)
    for ours, theirs in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Softmax, {"inverse_temperature": 0.0}, r"inverse_temperature must be .*, got 0\.0"),
        (Softmax, {"inverse_temperature": float("nan")}, "inverse_temperature must be .*, got nan"),
        (Best, {"share": 1.5}, r"share must be a finite number in \(0, 1\], got 1\.5"),
        (Best, {"share": 0.0}, r"share must be a finite number in \(0, 1\], got 0\.0"),
    ],
)
def test_wrong_values_of_a_part_are_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_weights_are_a_part(line):
    with pytest.raises(TypeError, match=r"weights must be Softmax\(…\) or Best\(…\), got 0\.1"):
        RWR(DenoisingPolicy(line), make_env(line), weights=0.1)
