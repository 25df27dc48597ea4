from collections import deque

import numpy as np
import pytest
import torch

from agents.advantages import PerPromptStats, clip_advantages, normalise


def published_tracker(buffer_size, min_count):
    """ddpo-pytorch's PerPromptStatTracker, retold as a closure."""
    stats = {}

    def update(prompts, rewards):
        rewards = np.array(rewards)
        prompts = np.array(prompts)
        advantages = np.empty_like(rewards)
        for prompt in np.unique(prompts):
            mine = rewards[prompts == prompt]
            stats.setdefault(prompt, deque(maxlen=buffer_size)).extend(mine)
            if len(stats[prompt]) < min_count:
                mean, std = rewards.mean(), rewards.std() + 1e-6
            else:
                mean, std = np.mean(stats[prompt]), np.std(stats[prompt]) + 1e-6
            advantages[prompts == prompt] = (mine - mean) / std
        return advantages

    return update


def test_per_prompt_advantages_are_those_of_ddpo_pytorch():
    rng = np.random.default_rng(0)
    ours, published = PerPromptStats(16, 8), published_tracker(16, 8)
    for _ in range(20):
        prompts, rewards = rng.integers(0, 5, 12), rng.normal(2.3, 0.4, 12)
        expected = published(prompts, rewards)
        np.testing.assert_allclose(ours.update(prompts.tolist(), rewards.tolist()), expected, rtol=1e-5, atol=1e-5)


def test_per_prompt_statistics_survive_a_checkpoint():
    rng = np.random.default_rng(0)
    first = PerPromptStats(8, 2)
    for _ in range(3):
        first.update(rng.integers(0, 3, 6).tolist(), rng.normal(size=6).tolist())
    again = PerPromptStats(8, 2)
    again.load_state_dict(first.state_dict())
    rewards = rng.normal(size=6).tolist()
    np.testing.assert_array_equal(first.update([0, 1, 2] * 2, rewards), again.update([0, 1, 2] * 2, rewards))


def test_prompts_outside_the_set_are_compared_to_the_batch():
    stats = PerPromptStats(4, 1)
    advantages = stats.update([-1, -1, 0], [1.0, 2.0, 6.0])
    assert advantages[:2] == pytest.approx([(1 - 3) / np.std([1, 2, 6]), (2 - 3) / np.std([1, 2, 6])], rel=1e-4)


def test_normalised_rewards_have_mean_zero_and_std_one():
    rewards = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 3 + 7
    advantages = normalise(rewards)
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-5)
    assert float(advantages.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert (normalise(torch.full((5,), 3.0)) == 0).all()


def test_clipping():
    values = torch.tensor([-9.0, 0.5, 9.0])
    assert clip_advantages(values, 5).tolist() == [-5, 0.5, 5]
    assert clip_advantages(values, None) is values


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match=r"min_count must be between 1 and buffer_size \(16\), got 17"):
        PerPromptStats(16, 17)
