"""Finished images with their rewards: of a rollout, of a share of one, or of a folder."""

import dataclasses
import json
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

import diffusion_gym  # noqa: F401
from agents import RWR, DenoisingPolicy, Replay, Rollout, collect
from agents.experience.constants import Constants
from agents.experience.storage import Storage
from diffusion_gym.rewards import to_uint8


@pytest.fixture
def rollout(mixture) -> Rollout:
    """A rollout of 8 images, of which the rewards of two are not valid."""
    env = gym.make_vec(
        "DenoisingMDP-v0", num_envs=4, num_steps=2, model=mixture, reward="brightness", prompts=["north", "west"]
    )
    found = collect(env, DenoisingPolicy(mixture, seed=0), seeds=[0, 4])
    valid = np.array([True, False, True, True, True, True, False, True])
    returns = torch.where(torch.from_numpy(valid), found.returns, torch.nan)
    return dataclasses.replace(found, valid=valid, returns=returns)


def test_a_replay_of_a_rollout_is_of_its_last_latents_and_valid_rewards(rollout):
    replay = Replay.from_rollout(rollout)
    kept = [0, 2, 3, 4, 5, 7]
    assert len(replay) == 6
    latents, constants = replay.inputs(torch.arange(6))
    assert torch.equal(latents, rollout.actions[-1][kept])
    assert torch.equal(replay.rewards, rollout.returns[kept])
    assert replay.prompts.tolist() == rollout.prompt_id[kept].tolist()
    assert constants.keys() == {"prompt_id", "prompt_embeds", "negative_prompt_embeds"}
    for key, values in constants.items():
        assert torch.equal(values, rollout.constants[key][torch.tensor(kept)]), key


def test_latents_of_low_precision_are_float32_in_a_replay(mixture):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=2, model=mixture, reward="brightness")
    rounded = collect(env, DenoisingPolicy(mixture, seed=0), seeds=[0], storage=Storage(dtype=torch.float16))
    replay = Replay.from_rollout(rounded)
    assert replay.latents.dtype == torch.float32
    assert torch.equal(replay.latents, rounded.actions[-1].float())


def test_each_process_has_the_latents_of_its_own_episodes(rollout):
    """Rewards and prompts are of all; indices count all that are valid."""
    whole, index = Replay.from_rollout(rollout), torch.arange(6)
    for first, here in ((0, [0, 1, 2]), (4, [3, 4, 5])):
        part = slice(first, first + 4)
        share = Replay.from_rollout(
            dataclasses.replace(
                rollout,
                actions=rollout.actions[:, part],
                constants={key: value.part(part) for key, value in rollout.constants.items()},
                first_episode=first,
            )
        )
        assert len(share) == 6
        assert torch.equal(share.rewards, whole.rewards)
        assert share.is_here(np.arange(6)).tolist() == [row in here for row in range(6)]
        (latents, constants), (expected, others) = (one.inputs(index[here]) for one in (share, whole))
        assert torch.equal(latents, expected)
        assert all(torch.equal(constants[key], others[key]) for key in others)


def test_shares_of_a_replay_are_the_whole():
    numbers = torch.arange(7.0)
    replay = Replay(numbers[:, None, None, None], {"number": numbers}, numbers, numbers.long().numpy())
    rows = np.array([6, 0, 3, 2])
    found = {}
    for part in (range(0, 3), range(3, 7)):
        share = replay.share(part)
        assert len(share) == 7
        mine = rows[share.is_here(rows)]
        latents, constants = share.inputs(torch.from_numpy(mine))
        assert torch.equal(latents.flatten(), constants["number"])
        found |= dict(zip(mine.tolist(), latents.flatten().tolist(), strict=True))
    assert found == {row: float(row) for row in rows}


def test_a_share_of_a_share_counts_all_samples():
    numbers = torch.arange(9.0)
    replay = Replay(numbers[:, None, None, None], {"number": numbers}, numbers, numbers.long().numpy())
    share = replay.share(range(3, 9)).share(range(5, 7))
    assert share.is_here(np.arange(9)).tolist() == [5 <= row < 7 for row in range(9)]
    latents, constants = share.inputs(torch.tensor([6, 5]))
    assert latents.flatten().tolist() == constants["number"].tolist() == [6, 5]


def test_constants_are_given_as_they_are_or_as_a_row_for_each():
    values = torch.arange(3.0)
    for given in (values, Constants(torch.tensor([0.0, 1.0, 2.0]), torch.arange(3))):
        replay = Replay(values[:, None, None, None], {"number": given}, values, np.arange(3))
        assert torch.equal(replay.inputs(torch.tensor([2, 0]))[1]["number"], torch.tensor([2.0, 0.0]))


# images on disk
def test_a_folder_of_images_is_the_rollout_that_they_were_drawn_in(tiny, tmp_path):
    """And an algorithm can learn from it."""
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=3, model=tiny, reward="brightness")
    policy = DenoisingPolicy(tiny, seed=0)
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
    before = [parameter.clone() for parameter in policy.parameters()]
    assert float(RWR(policy, env, n_epochs=1, learning_rate=1e-3, seed=0).fit(replay)["loss"]) > 0
    assert any(not torch.equal(*pair) for pair in zip(before, policy.parameters(), strict=True))
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
