"""Advantages: the functions against published codes, and the parts that are given to algorithms."""

import dataclasses
import json
from collections import deque

import numpy as np
import pytest
import torch
from gymnasium.spaces import Dict

from agents import Batch, Groups, PerPrompt, PromptMeans
from agents.advantages import (
    PerPromptStats,
    Rewards,
    clip_advantages,
    deviations,
    group_advantages,
    grouped_by_prompt,
    normalise,
    warn_of_lonely,
)

NOWHERE = (Dict(), torch.device("cpu"))


def rewards_of(values, prompt_id=None, *, texts=("a cat", "a dog"), group_size=1, valid=None):
    """Return a rollout's rewards, all of one prompt unless said otherwise."""
    values = torch.as_tensor(values, dtype=torch.float32)
    prompt_id = np.zeros(len(values), dtype=np.int64) if prompt_id is None else np.asarray(prompt_id)
    valid = np.ones(len(values), dtype=bool) if valid is None else np.asarray(valid)
    return Rewards(values, valid, prompt_id, texts, group_size)


def prompts_of(prompt_id, texts):
    """Return the prompts that episodes with these indices are of."""
    return rewards_of(torch.zeros(len(prompt_id)), prompt_id, texts=texts).prompts()


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
        prompts, rewards = rng.choice(["a cat", "a dog", "a fox"], 12), rng.normal(2.3, 0.4, 12)
        expected = published(prompts, rewards)
        np.testing.assert_allclose(ours.update(prompts.tolist(), rewards.tolist()), expected, rtol=1e-5, atol=1e-5)


def test_per_prompt_statistics_survive_a_checkpoint():
    rng = np.random.default_rng(0)
    first = PerPromptStats(8, 2)
    for _ in range(3):
        first.update(rng.choice(["a cat", "a dog"], 6).tolist(), rng.normal(size=6).tolist())
    again = PerPromptStats(8, 2)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    prompts, rewards = ["a cat", "a dog", "a fox"] * 2, rng.normal(size=6).tolist()
    np.testing.assert_array_equal(first.update(prompts, rewards), again.update(prompts, rewards))


def test_statistics_are_of_a_prompts_text_not_of_its_place():
    """A run that goes on with other prompts compares none of them with what was in its place before."""
    first = PerPromptStats(16, 2)
    east, west = (prompts_of([0] * 4, [text]) for text in ("east", "west"))
    first.update(east, [10.0, 11.0, 10.0, 11.0])
    again = PerPromptStats(16, 2)
    again.load_state_dict(first.state_dict())
    assert (again.update(west, [0.0] * 4) == 0).all()
    assert (again.update(east, [0.0] * 4) < -0.5).all()


def test_prompts_outside_the_set_are_compared_to_the_batch():
    stats = PerPromptStats(4, 1)
    texts = prompts_of([-1, -1, 0], ["a cat"])
    assert texts == [None, None, "a cat"]
    advantages = stats.update(texts, [1.0, 2.0, 6.0])
    assert advantages[:2] == pytest.approx([(1 - 3) / np.std([1, 2, 6]), (2 - 3) / np.std([1, 2, 6])], rel=1e-4)


def test_normalised_rewards_have_mean_zero_and_std_one():
    rewards = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 3 + 7
    advantages = normalise(rewards)
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-5)
    assert float(advantages.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert (normalise(torch.full((5,), 3.0)) == 0).all()


def _of_prompts(rewards, **how):
    stats = PerPromptStats(**how)
    return torch.from_numpy(stats.update(["a cat"] * len(rewards), rewards.tolist()))


@pytest.mark.parametrize("level", [21.3, -21.3, 0.03, 4e5])
@pytest.mark.parametrize(
    "advantages_of",
    [
        normalise,
        lambda rewards: _of_prompts(rewards, min_count=1),
        _of_prompts,
        lambda rewards: grouped_by_prompt(rewards, np.arange(len(rewards)) % 4),
        *(
            lambda rewards, scale=scale: group_advantages(rewards.reshape(4, 16), scale=scale).flatten()
            for scale in ("none", "rollout", "global", "group")
        ),
    ],
)
def test_rewards_that_differ_by_rounding_alone_have_no_advantages(advantages_of, level):
    """Of a few units in the last place of float32; ten times the tolerance is a signal again."""
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = (level * (1 + 1e-7 * noise)).float()
    assert len(set(rounded.tolist())) > 3
    assert (advantages_of(rounded) == 0).all()
    told_apart = (level * (1 + 2e-5 * noise)).float()
    assert advantages_of(told_apart).abs().max() > 0


def test_deviations_are_those_from_the_mean_of_the_last_dimension():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1e-30]])
    expected = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(deviations(rewards), expected)
    assert (deviations(rewards)[1:3] == 0).all()


def test_leave_one_out_compares_each_sample_with_the_others():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = [[1 - 4, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3.0]]
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(expected))
    drawn = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_advantages(drawn).sum(1), torch.zeros(5), rtol=0, atol=1e-5)
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


def test_groups_of_a_prompt_are_compared_as_in_diffusion_nft():
    """train_nft_sd3.py: the mean of the prompt's rewards, the standard deviation of all of them."""
    rewards, prompts = np.array([1.0, 2.0, 6.0, 0.0, 3.0, 7.0]), np.array([3, 0, 3, 0, 3, 5])
    means = np.array([rewards[prompts == prompt].mean() for prompt in prompts])
    found = grouped_by_prompt(torch.from_numpy(rewards).float(), prompts)
    np.testing.assert_allclose(found.numpy(), (rewards - means) / (rewards.std() + 1e-4), rtol=1e-5)
    assert found[5] == 0


def test_global_scale_is_the_standard_deviation_of_all_rewards():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(correction=0)
    torch.testing.assert_close(group_advantages(rewards, baseline="group_mean", scale="global"), expected)


def test_a_prompt_with_one_image_is_warned_of():
    warn_of_lonely(np.array([2, 1, 2, 1]), "…")
    with pytest.warns(
        UserWarning,
        match="some prompts have one image in a rollout, .*: it is lost. Give a group_size",
    ):
        warn_of_lonely(np.array([2, 1, 2]), "it is lost")


def test_clipping():
    values = torch.tensor([-9.0, 0.5, 9.0])
    assert clip_advantages(values, 5).tolist() == [-5, 0.5, 5]
    assert clip_advantages(values, None) is values


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match=r"min_count must be between 1 and buffer_size \(16\), got 17"):
        PerPromptStats(16, 17)


@pytest.mark.parametrize("center", [False, True])
def test_centred_advantages_have_mean_zero(center):
    part = PerPrompt(8, 1, center=center)
    memory = part.memory(*NOWHERE)
    memory.update(["a cat", "a dog"] * 2, [-1.0] * 4)  # the reward was lower before
    advantages = part.of(rewards_of([0.5, 1.0, 2.0, 0.0], [0, 1, 0, 1]), memory)
    assert (abs(float(advantages.mean())) < 1e-6) is center
    assert advantages.dtype == torch.float32


def test_a_part_is_the_function_of_its_name():
    rewards = rewards_of([1.0, 2.0, 6.0, 0.0, 0.0, 3.0], [0, 0, 0, 1, 1, 1], group_size=3)
    values = rewards.values
    assert torch.equal(Batch(clip=None).of(rewards), normalise(values))
    assert torch.equal(Groups().of(rewards), group_advantages(values.reshape(2, 3)).flatten())
    assert torch.equal(PromptMeans().of(rewards), grouped_by_prompt(values, rewards.prompt_id))
    part = PerPrompt(4, 2, clip=None)
    expected = PerPromptStats(4, 2).update(rewards.prompts(), values.tolist())
    assert torch.equal(part.of(rewards, part.memory(*NOWHERE)), torch.from_numpy(expected))


@pytest.mark.parametrize(
    "part", [PerPrompt(4, 1, clip=0.5), Batch(0.5), Groups("group_mean", scale="global", clip=0.5), PromptMeans(0.5)]
)
def test_advantages_are_clipped_after_all_else(part):
    rewards = rewards_of([0.0, 4.0, 1.0, 2.0], [0, 0, 1, 1], group_size=2)
    free = dataclasses.replace(part, clip=None).of(rewards, part.memory(*NOWHERE))
    assert free.abs().max() > 0.5
    torch.testing.assert_close(part.of(rewards, part.memory(*NOWHERE)), free.clamp(-0.5, 0.5), rtol=0, atol=0)


@pytest.mark.parametrize("part", [PerPrompt(4, 1), Batch(), Groups(), PromptMeans()])
def test_an_episode_without_a_reward_counts_for_no_other(part):
    rewards = rewards_of(
        [1.0, float("nan"), 6.0, 0.0, 5.0, 3.0], [0, 0, 0, 1, 1, 1], group_size=3, valid=[1, 0] + [1] * 4
    )
    advantages = part.of(rewards, part.memory(*NOWHERE))
    assert float(advantages[1]) == 0
    if not part.compares_groups:
        rest = [0, 2, 3, 4, 5]
        others = part.of(rewards_of(rewards.values[rest], rewards.prompt_id[rest]), part.memory(*NOWHERE))
        assert torch.equal(advantages[rest], others)
    else:
        torch.testing.assert_close(advantages, torch.tensor([-5.0, 0.0, 5.0, -4.0, 3.5, 0.5]))


def test_a_prompt_counts_from_a_full_memory_on_unless_said_otherwise():
    assert (PerPrompt(16).memory(*NOWHERE).min_count, PerPrompt(16, 2).memory(*NOWHERE).min_count) == (16, 2)
    assert [part.memory(*NOWHERE) for part in (Batch(), Groups(), PromptMeans())] == [None] * 3


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (PerPrompt, {"buffer_size": 4, "min_count": 16}, r"min_count must be between 1 and buffer_size \(4\), got 16"),
        (PerPrompt, {"buffer_size": 0}, "buffer_size must be an integer of at least 1, got 0"),
        (PerPrompt, {"clip": 0.0}, "clip must be .*, got 0.0"),
        (Batch, {"clip": float("nan")}, "clip must be a finite number .*, got nan"),
        (PromptMeans, {"clip": -1.0}, "clip must be .*, got -1.0"),
        (Groups, {"clip": 0.0}, "clip must be .*, got 0.0"),
        (Groups, {"baseline": "value"}, "baseline must be one of .*got 'value'"),
        (Groups, {"scale": None}, "scale must be one of .*got None"),
        (Groups, {"baseline": "group_mean", "scale": "rollout"}, "baseline='group_mean' has no effect"),
    ],
)
def test_wrong_values_of_a_part_are_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_groups_of_one_are_refused():
    Groups().check(2)
    for part in (PerPrompt(), Batch(), PromptMeans()):
        part.check(1)
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1; give rollouts="):
        Groups().check(1)
