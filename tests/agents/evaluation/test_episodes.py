"""An evaluation is a function of its seeds, and the error of its mean is over prompts, not over images."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import ContextFreeSchedule, DenoisingPolicy, Evaluation, evaluate
from agents.evaluation import standard_error
from agents.experience.seeding import derived_generator
from diffusion_gym.samplers import DDIM


def test_the_standard_error_over_prompts_is_that_of_their_means():
    rng = np.random.default_rng(0)
    rewards = (rng.normal(0, 1, (12, 1)) + rng.normal(0, 0.3, (12, 5))).astype(np.float32)
    prompts = [f"prompt {row}" for row in range(12) for _ in range(5)]
    means = rewards.astype(np.float64).mean(1)
    assert standard_error(rewards.flatten(), prompts) == pytest.approx(means.std(ddof=1) / 12**0.5, rel=1e-6)
    assert standard_error(rewards.flatten(), prompts) > 1.5 * standard_error(rewards.flatten())
    shuffled = rng.permutation(60)
    again = standard_error(rewards.flatten()[shuffled], [prompts[row] for row in shuffled])
    assert again == pytest.approx(standard_error(rewards.flatten(), prompts), rel=1e-6)


def test_the_standard_error_over_prompts_of_uneven_numbers_covers_the_mean():
    """128 images of 45 prompts: the standard deviation of the mean over many worlds."""
    rng = np.random.default_rng(0)
    of = np.arange(128) % 45
    means, errors = [], []
    for _ in range(2000):
        values = rng.normal(0, 1, 45)[of] + rng.normal(0, 0.5, 128)
        means.append(values.mean())
        errors.append(standard_error(values, [str(prompt) for prompt in of]))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)


def test_images_of_one_prompt_alone_are_observations():
    values = np.arange(6, dtype=np.float32)
    assert standard_error(values, ["a fox"] * 6) == pytest.approx(values.std(ddof=1) / 6**0.5)
    assert standard_error(values, list("abcdef")) == pytest.approx(values.std(ddof=1) / 6**0.5)


def test_an_evaluations_errors_are_over_prompts():
    rewards = np.array([1, 1.1, 5, 5.2, 9, 8.8], dtype=np.float32)
    both = {"lengths": np.ones(6), "images": torch.zeros(0), "prompts": tuple("aabbcc"), "seeds": tuple(range(6))}
    after, before = Evaluation(rewards=rewards, **both), Evaluation(rewards=rewards[::-1].copy(), **both)
    assert after.standard_error == standard_error(rewards, list("aabbcc"))
    assert after.gain_over(before) == pytest.approx(
        (0, standard_error(rewards - rewards[::-1], list("aabbcc"))), abs=1e-6
    )


def test_evaluation_depends_on_the_seeds_alone(emoji, make_env):
    policy = DenoisingPolicy(emoji)
    prompts, seeds = ["a cat", "a dog", "a cow", "a bee"], [10, 11, 12, 13]
    four = evaluate(make_env(num_envs=4), policy, seeds=seeds, prompts=prompts)
    two = evaluate(make_env(num_envs=2), policy, seeds=seeds, prompts=prompts)
    np.testing.assert_allclose(four.rewards, two.rewards, atol=1e-4)
    torch.testing.assert_close(four.images, two.images, rtol=0, atol=2e-3)
    assert len(set(four.rewards.tolist())) == 4
    gain, error = two.gain_over(four)
    assert abs(gain) < 1e-4
    assert error < 1e-4
    assert four.mean == pytest.approx(four.rewards.mean())
    assert four.standard_error == pytest.approx(four.rewards.std(ddof=1) / 2)
    with pytest.raises(ValueError, match="multiple of num_envs=4"):
        evaluate(make_env(num_envs=4), policy, seeds=[1], prompts=["a cat"])
    with pytest.raises(ValueError, match="same seeds and prompts"):
        evaluate(make_env(num_envs=2), policy, seeds=[1, 2], prompts=["a cat"] * 2).gain_over(four)
    with pytest.raises(ValueError, match="same seeds and prompts"):
        evaluate(make_env(num_envs=4), policy, seeds=[10, 11, 12, 14], prompts=prompts).gain_over(four)


def test_evaluation_without_prompts_takes_the_environments_in_turn(emoji, make_env):
    env = make_env(num_envs=2)
    given = env.unwrapped.prompts
    assert evaluate(env, DenoisingPolicy(emoji), seeds=[0, len(given) + 1]).prompts == (given[0], given[1])


def test_evaluation_noise_is_not_the_initial_noise(emoji, make_env):
    """The policy's draws and x_T come from streams of their own."""
    env = make_env(num_envs=1, num_steps=20)
    start = env.reset(seed=10)[0]["latents"].flatten()
    noise = torch.randn(1, 4, 16, 16, generator=derived_generator(10)).flatten()
    for shift in range(-3, 4):
        assert abs(float(torch.corrcoef(torch.stack([start, noise.roll(shift)]))[0, 1])) < 0.15


def test_the_first_images_are_kept_and_all_rewards_and_lengths(mixture):
    """In an environment whose episodes differ in length, two lanes at a time."""
    env = gym.make_vec(
        "TimePredictionMDP-v0", num_envs=2, model=mixture, max_steps=8, reward="brightness", autoreset_mode="DISABLED"
    )
    policy = ContextFreeSchedule([0.5] * 8, initial_concentration=4.0, seed=0)
    every, some, none = (evaluate(env, policy, seeds=range(6), max_images=count) for count in (64, 3, 0))
    assert [len(one.images) for one in (every, some, none)] == [6, 3, 0]
    assert torch.equal(some.images, every.images[:3])
    assert len(set(every.lengths.tolist())) > 1
    for one in (some, none):
        np.testing.assert_array_equal(one.rewards, every.rewards)
        np.testing.assert_array_equal(one.lengths, every.lengths)
    np.testing.assert_allclose(every.rewards, every.images.mean((1, 2, 3)), rtol=1e-5)


def test_deterministic_episodes_are_those_of_the_mode(mixture):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, num_steps=3, model=mixture, reward="brightness")
    drawn, mode = (evaluate(env, DenoisingPolicy(mixture), seeds=[0, 1], deterministic=only) for only in (False, True))
    without_noise = DenoisingPolicy(mixture, sampler=DDIM(0.0))
    assert not np.array_equal(drawn.rewards, mode.rewards)
    np.testing.assert_array_equal(
        evaluate(env, without_noise, seeds=[0, 1]).rewards,
        evaluate(env, without_noise, seeds=[0, 1], deterministic=True).rewards,
    )
