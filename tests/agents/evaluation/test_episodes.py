"""What is said of a mean: its error is over prompts, not over images."""

import numpy as np
import pytest
import torch

from agents import Evaluation
from agents.evaluation import standard_error


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
