"""The part that says how rollouts are collected, and what a rollout has of which process."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from agents import DenoisingPolicy, Replay, Rollouts, collect
from agents.experience.storage import Storage
from diffusion_gym.parts import described, made


def test_rollouts_are_written_down_and_made_again():
    rollouts = Rollouts(samples=np.int64(256), group_size=8, prompt_sampling="round_robin", dtype="bfloat16")
    assert made(json.loads(json.dumps(described(rollouts))), Rollouts) == rollouts
    assert made(described(Rollouts()), Rollouts) == Rollouts()


def test_storage_is_that_of_the_rollouts():
    assert Rollouts().storage() == Storage(None, None)
    assert Rollouts(device="cpu", dtype="float16").storage() == Storage(torch.device("cpu"), torch.float16)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        *((name, value) for name in ("samples", "group_size", "num_starts", "micro_batch_size") for value in (0, 1.5)),
        ("samples", True),
        ("group_size", None),
        ("prompt_sampling", "in turn"),
        ("prompt_sampling", None),
        ("dtype", "float64"),
        ("device", "nowhere"),
    ],
)
def test_what_a_field_does_not_allow_is_refused(field, wrong):
    with pytest.raises(ValueError, match=f"{field} must be .*got {wrong!r}"):
        Rollouts(**{field: wrong})


def test_starts_that_come_again_have_prompts_of_their_own():
    with pytest.raises(ValueError, match="num_starts draws prompt and noise together"):
        Rollouts(num_starts=3, prompt_sampling="round_robin")


def test_a_process_reads_its_own_episodes_by_the_indices_of_all(emoji, make_env):
    rollout = collect(make_env(), DenoisingPolicy(emoji, seed=0), seeds=[0])
    of_all = {
        "log_probs": torch.cat([torch.zeros_like(rollout.log_probs), rollout.log_probs], 1),
        "returns": rollout.returns.repeat(2),
        "valid": np.tile(rollout.valid, 2),
        "prompt_id": np.tile(rollout.prompt_id, 2),
        "ends": torch.cat([torch.zeros_like(rollout.ends), rollout.ends]),
    }
    second = dataclasses.replace(rollout, first_episode=4, **of_all)
    assert second.lanes_here == slice(4, 8)
    assert second.is_here(np.array([3, 4, 7, 8])).tolist() == [False, True, True, False]
    steps, lanes = torch.tensor([0, 2, 1]), torch.tensor([0, 3, 1])
    assert torch.equal(second.action(steps, lanes + 4), rollout.action(steps, lanes))
    expected = rollout.observation(steps, lanes)
    for key, value in second.observation(steps, lanes + 4).items():
        assert torch.equal(value, expected[key]), key
    parts = list(second.micro_batches(np.array([0, 0, 1, 2, 2]), np.array([1, 4, 5, 0, 7]), 2))
    assert [(k.tolist(), b.tolist()) for k, b in parts] == [([0, 1], [4, 5]), ([2], [7])]
    replay, whole = Replay.from_rollout(second), Replay.from_rollout(rollout)
    assert (replay.first_sample, len(replay), len(replay.latents)) == (4, 8, 4)
    index = torch.arange(4)
    assert torch.equal(replay.inputs(index + 4)[0], whole.inputs(index)[0])
