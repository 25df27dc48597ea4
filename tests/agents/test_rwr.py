import json
import re
from collections import Counter
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

import diffusion_gym  # noqa: F401
from agents import RWR, ContextFreeSchedule, DenoisingPolicy, Replay, collect, evaluate
from agents.logs.diagnostics import effective_sample_size
from agents.rwr import best_weights, softmax_weights
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import write_mixture
from diffusion_gym.rewards import to_uint8
from tests.gradients import assert_gradients_close
from tests.tiny import make_tiny_stable_diffusion


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_model(make_tiny_stable_diffusion(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    folder = tmp_path_factory.mktemp("line")
    return load_model(write_mixture(folder, [[-1.0], [1.0]], stds=[0.3, 0.3], names=["left", "right"]))


def make_env(model, num_envs=8, **arguments):
    arguments = {"num_steps": 3, "reward": "brightness", **arguments}
    return gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, model=model, **arguments)


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


def test_rewards_that_differ_by_rounding_alone_weigh_alike(line):
    learner = RWR(DenoisingPolicy(line, seed=0), make_env(line), inverse_temperature=5.0, seed=0)
    replay = Replay.from_rollout(collect(learner.env, learner.policy, seeds=[0]))
    noise = 1e-6 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(learner.weights(replace(replay, rewards=21.3 + noise)), torch.ones(8))
    assert learner.weights(replace(replay, rewards=21.3 + 1e4 * noise)).max() > 2


def test_a_prompt_that_is_drawn_once_is_warned_of(line):
    learner = RWR(DenoisingPolicy(line, seed=0), make_env(line), per_prompt=True, seed=0)
    replay = Replay.from_rollout(collect(learner.env, learner.policy, seeds=[0]))
    with pytest.warns(UserWarning, match="its weight is 1, whatever its reward"):
        learner.weights(replace(replay, prompts=np.arange(8)))
    assert learner.weights(replace(replay, prompts=np.arange(8) // 2)).sum() == pytest.approx(8)


@pytest.mark.parametrize(("num_rows", "sizes"), [(8, [4, 4]), (9, [5, 4]), (5, [5]), (2, [2]), (11, [4, 4, 3])])
def test_the_updates_of_a_pass_are_of_about_one_size(line, num_rows, sizes):
    """Not a full step from the few rows that are left over."""
    learner = RWR(DenoisingPolicy(line, seed=0), make_env(line, 16), n_epochs=1, batch_size=4, seed=0)
    batches = list(learner._batches(np.arange(num_rows), np.random.default_rng(0)))
    assert [len(batch) for batch in batches] == sizes
    assert sorted(np.concatenate(batches)) == list(range(num_rows))


@pytest.mark.parametrize(("noise_draws", "passes"), [(1, [3, 1]), (2, [3, 3, 2])])
def test_the_update_is_weighted_regression_on_noised_images(tiny, monkeypatch, noise_draws, passes):
    """Against the loss written out, with the same times and noises."""
    env = make_env(tiny, num_envs=4)
    policy = DenoisingPolicy(tiny, guidance_scale=2.0, seed=0)
    sizes = {"n_epochs": 1, "micro_batch_size": 3, "noise_draws": noise_draws}
    learner = RWR(policy, env, inverse_temperature=0.7, seed=0, **sizes)
    rollout = collect(env, policy, seeds=[0])
    drawn = []
    original = policy.predict_noised

    def remember(clean, t, noise, constants):
        drawn.append((clean, t, noise, constants))
        return original(clean, t, noise, constants)

    monkeypatch.setattr(policy, "predict_noised", remember)
    gradients = []
    monkeypatch.setattr(
        learner,
        "optimizer_step",
        lambda: gradients.append([p.grad.clone() for p in policy.parameters()]) or drawn[0][1].sum(),
    )
    metrics = learner.train(rollout)
    scores = (rollout.returns - rollout.returns.mean()) / rollout.returns.std(correction=0)
    weights = 4 * torch.softmax(0.7 * scores, 0)
    policy.zero_grad()
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
        total = total + (weights[rows] * (guided - noise).square().mean((1, 2, 3))).sum() / (4 * noise_draws)
    total.backward()
    assert [len(clean) for clean, *_ in drawn] == passes
    assert len(set(torch.cat([t for _, t, *_ in drawn]).tolist())) == 4 * noise_draws
    assert float(metrics["loss"]) == pytest.approx(float(total.detach()), rel=1e-4)
    assert float(metrics["effective_sample_size"]) == pytest.approx(float(effective_sample_size(weights)), rel=1e-4)
    assert_gradients_close(gradients[0], [parameter.grad for parameter in policy.parameters()])


@pytest.mark.parametrize("common_noise", [False, True])
def test_the_samples_of_a_prompt_may_be_noised_alike(tiny, monkeypatch, common_noise):
    """Each draw of an update has one time and one noise for a prompt, or for a sample; all within the range."""
    env = make_env(tiny, num_envs=8, prompts=["a cat", "a dog"])
    policy = DenoisingPolicy(tiny, seed=0)
    sizes = {"n_epochs": 1, "micro_batch_size": 3, "noise_draws": 5, "group_size": 4, "batch_size": 8}
    how = {"time_range": (0.6, 0.9), "common_noise": common_noise, "prompt_sampling": "round_robin"}
    learner = RWR(policy, env, seed=0, **sizes, **how)
    predict, drawn = policy.predict_noised, Counter()

    def remember(clean, t, noise, constants):
        for index in range(len(clean)):
            prompt = round(float(constants["prompt_embeds"][index].sum()), 3)
            drawn[prompt, float(t[index]), round(float(noise[index].sum()), 3)] += 1
        return predict(clean, t, noise, constants)

    monkeypatch.setattr(policy, "predict_noised", remember)
    learner.learn(1)
    assert sum(drawn.values()) == 8 * 5
    assert sorted(drawn.values()) == ([4] * 2 * 5 if common_noise else [1] * 8 * 5)
    times = [t / tiny.schedule.num_train_timesteps for _, t, _ in drawn]
    assert 0.6 <= min(times) < 0.7
    assert 0.8 < max(times) < 0.9


@pytest.mark.parametrize("best_share", [None, 0.25])
def test_it_regresses_to_the_tilted_mixture(line, best_share, monkeypatch):
    """One round on 8,192 samples, against the tilted law (or the best quarter) of those samples themselves."""
    env = make_env(
        line, 1024, num_steps=30, reward=lambda images, *_: line.positions(images)[:, 0], prompts=["anything"]
    )
    policy = DenoisingPolicy(line, seed=0)
    learner = RWR(
        policy,
        env,
        learning_rate=3e-3,
        samples_per_epoch=8192,
        batch_size=512,
        n_epochs=60,
        seed=0,
        **({"best_share": best_share} if best_share else {"normalise_rewards": False, "inverse_temperature": 0.7}),
    )
    seen = []
    fit = learner.fit
    monkeypatch.setattr(learner, "fit", lambda replay: seen.append(replay.rewards) or fit(replay))
    learner.learn(1, log_interval=0)
    x = seen[0].double()
    weights = best_weights(x, share=best_share) if best_share else torch.exp(0.7 * x)
    expected_mean = float((weights * x).sum() / weights.sum())
    expected_share = float((weights * (x > 0)).sum() / weights.sum())
    after = evaluate(env, policy, seeds=range(4096), prompts=["anything"] * 4096)
    assert float(x.mean()) == pytest.approx(0.0, abs=0.05)
    assert expected_mean > 0.5
    assert after.mean == pytest.approx(expected_mean, abs=0.12)
    assert (after.rewards > 0).mean() == pytest.approx(expected_share, abs=0.05)


def test_it_learns_from_a_folder_of_images(tiny, tmp_path, monkeypatch):
    env = make_env(tiny, num_envs=4)
    policy = DenoisingPolicy(tiny, seed=0)
    predict = policy.predict_noised
    rollout = collect(env, policy, seeds=[0], max_images=4)
    texts = [env.unwrapped.prompts[index] for index in rollout.prompt_id]
    lines = []
    for k, pixels in enumerate(to_uint8(rollout.images).numpy()):
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
        lines.append({"file_name": f"{k}.png", "prompt": texts[k], "reward": float(rollout.returns[k])})
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    replay = Replay.from_folder(tmp_path, tiny)
    torch.testing.assert_close(replay.latents, tiny.encode(rollout.images), rtol=0.05, atol=0.05)
    torch.testing.assert_close(replay.rewards, rollout.returns)
    for key, value in replay.constants.items():
        torch.testing.assert_close(value[:], rollout.constants[key][:])
    assert len(replay) == 4
    learner = RWR(policy, env, n_epochs=2, learning_rate=1e-3, seed=0)
    before = [parameter.clone() for parameter in policy.parameters()]
    assert float(learner.fit(replay)["loss"]) > 0
    assert any(not torch.equal(*pair) for pair in zip(before, policy.parameters(), strict=True))
    noised = []
    monkeypatch.setattr(policy, "predict_noised", lambda *inputs: noised.append(inputs[2]) or predict(*inputs))
    for _ in range(2):
        learner.fit(replay)
    assert len({float(noise.sum()) for noise in noised}) == 4
    with pytest.raises(FileNotFoundError, match=r"has no metadata\.jsonl"):
        Replay.from_folder(tmp_path / "elsewhere", tiny)
    with pytest.raises(TypeError, match=r"model must be a DiffusionModel, .* got 'emoji'"):
        Replay.from_folder(tmp_path, "emoji")


@pytest.mark.parametrize(
    "wrong",
    [
        '{"file_name": "0.png", "prompt": "a cat"}',
        '{"file_name": "0.png", "prompt": "a cat", "reward": "x"}',
        '{"file_name": "0.png", "prompt": "a cat", "reward": null}',
        '{"file_name": "0.png", "prompt": "a cat", "reward": NaN}',
        '{"file_name": "0.png", "prompt": "a cat", "reward": -Infinity}',
        '{"file_name": "0.png", "prompt": 3, "reward": 1.0}',
        '{"file_name": "0.png"',
        '["0.png", "a cat", 1.0]',
    ],
)
def test_a_wrong_line_of_a_folder_is_named(line, tmp_path, wrong):
    right = '{"file_name": "0.png", "prompt": "a cat", "reward": 1}'
    (tmp_path / "metadata.jsonl").write_text(f"{right}\n\n{wrong}\n")
    with pytest.raises(ValueError, match=rf"metadata\.jsonl, line 3: expected .*, got {re.escape(wrong)}"):
        Replay.from_folder(tmp_path, line)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl is empty"):
        Replay.from_folder(tmp_path, line)


@pytest.mark.parametrize("best_share", [None, 0.5])
def test_what_cannot_be_learnt_from_is_refused(line, tiny, best_share):
    learner = RWR(DenoisingPolicy(line, seed=0), make_env(line), best_share=best_share, seed=0)
    replay = Replay.from_rollout(collect(learner.env, learner.policy, seeds=[0]))
    before = [parameter.clone() for parameter in learner.policy.parameters()]
    with pytest.raises(TypeError, match=r"fit needs a Replay, .* got 'images'"):
        learner.fit("images")
    for value in (float("nan"), float("inf")):
        rewards = replay.rewards.clone()
        rewards[3] = value
        with pytest.raises(ValueError, match=f"rewards must be finite, got {value} in row 3"):
            learner.fit(replace(replay, rewards=rewards))
    with pytest.raises(ValueError, match=r"of shape \(1, 1, 1\); got \(4, 8, 8\)"):
        learner.fit(replace(replay, latents=torch.zeros(8, *tiny.latent_shape)))
    assert all(torch.equal(*pair) for pair in zip(before, learner.policy.parameters(), strict=True))


def test_an_interrupted_run_goes_on_bit_for_bit(line, tmp_path):
    def make():
        env = make_env(line, 16)
        return RWR(DenoisingPolicy(line, seed=0), env, learning_rate=1e-2, batch_size=8, best_share=0.5, seed=3)

    whole = make()
    whole.learn(4 * 48)
    half = make()
    half.learn(2 * 48)
    half.save(tmp_path / "run")
    again = RWR.load(tmp_path / "run", make_env(line, 16))
    again.learn(2 * 48, reset_num_timesteps=False)
    for ours, theirs in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 3}, r"batch_size must divide samples_per_epoch \(8\), got 3"),
        ({"n_epochs": 0}, "n_epochs must be an integer of at least 1, got 0"),
        ({"noise_draws": 0}, "noise_draws must be an integer of at least 1, got 0"),
        ({"time_range": (0.5, 0.5)}, r"time_range must be \(low, high\) with 0 ≤ low < high ≤ 1, got \(0\.5, 0\.5\)"),
        ({"time_range": (float("nan"), 1.0)}, r"time_range must be a finite number in \[0, 1\], got nan"),
        ({"time_range": (0.5,)}, r"time_range must be \(low, high\)"),
        ({"inverse_temperature": 0.0}, r"inverse_temperature must be .*, got 0\.0"),
        ({"best_share": 1.5}, r"best_share must be a finite number in \(0, 1\], got 1\.5"),
    ],
)
def test_wrong_arguments_are_named(line, arguments, message):
    with pytest.raises(ValueError, match=message):
        RWR(DenoisingPolicy(line), make_env(line), **arguments)


def test_policies_and_environments_of_times_are_refused(line):
    times = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model=line, autoreset_mode="DISABLED")
    with pytest.raises(ValueError, match="the images of DenoisingMDP-v0"):
        RWR(DenoisingPolicy(line), times)
    with pytest.raises(TypeError, match="must be a DenoisingPolicy, got ContextFreeSchedule"):
        RWR(ContextFreeSchedule([0.5] * 28), make_env(line))
