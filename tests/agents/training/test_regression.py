"""What algorithms share that learn from finished images, noised anew."""

from collections import Counter
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import RWR, Best, ContextFreeSchedule, DenoisingPolicy, DiffusionNFT, Noising, Replay, Rollouts, collect
from tests.gradients import applied_gradients

ALGORITHMS = [RWR, DiffusionNFT]


def make_env(model, num_envs=8, **arguments):
    arguments = {"num_steps": 3, "reward": "brightness", **arguments}
    return gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, model=model, **arguments)


def replay_of(learner):
    return Replay.from_rollout(collect(learner.env, learner.policy, seeds=[0]))


def watched(policy, monkeypatch):
    """Return a list that fills with what a policy is asked to predict."""
    asked, predict = [], policy.predict_noised

    def remember(clean, t, noise, constants, *, guidance_scale=None):
        asked.append((clean, t, noise, constants, guidance_scale))
        return predict(clean, t, noise, constants, guidance_scale=guidance_scale)

    monkeypatch.setattr(policy, "predict_noised", remember)
    return asked


@pytest.mark.parametrize(("num_rows", "sizes"), [(8, [4, 4]), (9, [5, 4]), (5, [5]), (2, [2]), (11, [4, 4, 3])])
def test_the_updates_of_a_pass_are_of_about_one_size(line, monkeypatch, num_rows, sizes):
    """Not a full step from the few rows that are left over."""
    learner = RWR(DenoisingPolicy(line, seed=0), make_env(line, 16), n_epochs=1, batch_size=4, seed=0)
    rows = torch.arange(num_rows)
    replay = Replay(
        latents=rows.float().reshape(-1, 1, 1, 1),
        constants={key: value[rows] for key, value in replay_of(learner).constants.items()},
        rewards=torch.linspace(0, 1, num_rows),
        prompts=np.zeros(num_rows, dtype=np.int64),
    )
    asked, applied = watched(learner.policy, monkeypatch), applied_gradients(learner)
    learner.fit(replay)
    assert [len(clean) for clean, *_ in asked] == sizes
    assert len(applied) == len(sizes)
    assert sorted(torch.cat([clean.flatten() for clean, *_ in asked]).tolist()) == list(range(num_rows))


@pytest.mark.parametrize("common", [False, True])
def test_the_samples_of_a_prompt_may_be_noised_alike(tiny, monkeypatch, common):
    """Each draw of an update has one time and one noise for a prompt, or for a sample; all within the range."""
    env = make_env(tiny, num_envs=8, prompts=["a cat", "a dog"])
    policy = DenoisingPolicy(tiny, seed=0)
    rollouts = Rollouts(group_size=4, prompt_sampling="round_robin", micro_batch_size=3)
    noising = Noising(draws=5, time_range=(0.6, 0.9), common=common)
    learner = RWR(policy, env, n_epochs=1, batch_size=8, rollouts=rollouts, noising=noising, seed=0)
    asked = watched(policy, monkeypatch)
    learner.learn(1, log_interval=0)
    drawn = Counter(
        (round(float(embeds.sum()), 3), float(time), round(float(eps.sum()), 3))
        for _, t, noise, constants, _ in asked
        for embeds, time, eps in zip(constants["prompt_embeds"], t, noise, strict=True)
    )
    assert sum(drawn.values()) == 8 * 5
    assert sorted(drawn.values()) == ([4] * 2 * 5 if common else [1] * 8 * 5)
    times = [t / tiny.schedule.num_train_timesteps for _, t, _ in drawn]
    assert 0.6 <= min(times) < 0.7
    assert 0.8 < max(times) < 0.9


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("scale", [None, 1.0, 3.0])
def test_the_prediction_that_is_regressed_may_have_another_guidance(tiny, monkeypatch, algorithm, scale):
    """None: the policy's, with which it samples in any case."""
    policy = DenoisingPolicy(tiny, guidance_scale=2.0, seed=0)
    rollouts = Rollouts(group_size=4)
    learner = algorithm(
        policy, make_env(tiny, 4), n_epochs=1, noising=Noising(guidance_scale=scale), rollouts=rollouts, seed=0
    )
    asked, scales, denoise = watched(policy, monkeypatch), set(), tiny.denoise

    def remember(*inputs, guidance_scale, denoiser):
        scales.add((denoiser is policy.denoiser and torch.is_grad_enabled(), guidance_scale))
        return denoise(*inputs, guidance_scale=guidance_scale, denoiser=denoiser)

    monkeypatch.setattr(tiny, "denoise", remember)
    learner.learn(1, log_interval=0)
    assert {one[-1] for one in asked} == {scale}
    assert {found for is_learning, found in scales if is_learning} == {scale or 2.0}
    assert 2.0 in {found for is_learning, found in scales if not is_learning}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_images_that_are_learnt_from_again_have_other_noises(line, monkeypatch, algorithm):
    learner = algorithm(DenoisingPolicy(line, seed=0), make_env(line), n_epochs=2, learning_rate=1e-3, seed=0)
    replay = replay_of(learner)
    before = [parameter.clone() for parameter in learner.policy.parameters()]
    asked = watched(learner.policy, monkeypatch)
    for _ in range(2):
        assert np.isfinite(float(learner.fit(replay)["loss"]))
    assert any(not torch.equal(*pair) for pair in zip(before, learner.policy.parameters(), strict=True))
    assert len(asked) == 4
    assert len({float(noise.sum()) for _, _, noise, *_ in asked}) == 4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_folder_may_have_more_or_fewer_images_than_a_rollout(line, algorithm):
    learner = algorithm(DenoisingPolicy(line, seed=0), make_env(line), batch_size=4, n_epochs=1, seed=0)
    replay = replay_of(learner)
    for rows in (torch.arange(3), torch.arange(24) % 8):
        constants = {key: value[rows] for key, value in replay.constants.items()}
        prompts = np.zeros(len(rows), dtype=np.int64)
        part = replace(replay, latents=replay.latents[rows], rewards=replay.rewards[rows], prompts=prompts)
        before = learner.num_updates
        learner.fit(replace(part, constants=constants))
        assert learner.num_updates - before == max(1, len(rows) // 4)


@pytest.mark.parametrize("arguments", [{}, {"weights": Best(0.5)}])
def test_what_cannot_be_learnt_from_is_refused(line, tiny, arguments):
    learner = RWR(DenoisingPolicy(line, seed=0), make_env(line), seed=0, **arguments)
    replay = replay_of(learner)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": 0}, "draws must be an integer of at least 1, got 0"),
        ({"time_range": (0.5, 0.5)}, r"time_range must be \(low, high\) with 0 ≤ low < high ≤ 1, got \(0\.5, 0\.5\)"),
        ({"time_range": (float("nan"), 1.0)}, r"time_range must be a finite number in \[0, 1\], got nan"),
        ({"time_range": (0.5,)}, r"time_range must be \(low, high\)"),
        ({"guidance_scale": -1.0}, r"guidance_scale must be a finite number in \[0, inf\), got -1\.0"),
    ],
)
def test_wrong_values_of_the_noising_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Noising(**arguments)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_policies_and_environments_of_times_are_refused(line, algorithm):
    times = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model=line, autoreset_mode="DISABLED")
    with pytest.raises(ValueError, match=f"{algorithm.__name__} learns from the images of DenoisingMDP-v0"):
        algorithm(DenoisingPolicy(line), times)
    with pytest.raises(TypeError, match="must be a DenoisingPolicy, got ContextFreeSchedule"):
        algorithm(ContextFreeSchedule([0.5] * 28), make_env(line))
