"""Finished images with their rewards, of a rollout or of a share of one."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DenoisingPolicy, Replay, Rollout, collect
from agents.experience.constants import Constants
from agents.experience.storage import Storage
from diffusion_gym.models import load_model


@pytest.fixture(scope="module")
def mixture():
    return load_model("mixture")


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
