"""Wrappers stay on the device: on a fake one, where mixing devices and waits outside `to_host` raise."""

import gymnasium as gym
import pytest
import torch

from diffusion_gym.wrappers import EpisodeStatistics, PotentialShaping, PredictionAction
from tests.diffusion_gym.envs.test_residency import on_device, waits  # noqa: F401
from tests.fake_device import DEVICE, BlockingCopies, on_the_host


def statistics(env, monkeypatch):
    return EpisodeStatistics(env)


def shaping(env, monkeypatch):
    return PotentialShaping(env, lambda observation: observation["latents"].flatten(1).mean(1))


def prediction(env, monkeypatch):
    on_the_host(monkeypatch, PredictionAction, "_begin")
    return PredictionAction(env)


@pytest.mark.parametrize("mode", ["SAME_STEP", "NEXT_STEP", "DISABLED"])
@pytest.mark.parametrize("wrap", [statistics, shaping, prediction])
def test_a_step_neither_waits_nor_copies_what_blocks(on_device, waits, monkeypatch, wrap, mode):  # noqa: F811
    bare = gym.make_vec("DenoisingMDP-v0", num_envs=3, num_steps=4, reward="brightness", autoreset_mode=mode)
    env = wrap(bare, monkeypatch)
    on_device(bare)
    env.reset(seed=0)
    env.step(torch.empty(3, 4, 16, 16, device=DEVICE))  # the schedule's tables are sent once
    with BlockingCopies() as copies:
        for _ in range(2):
            _, reward, _, _, info = env.step(torch.empty(3, 4, 16, 16, device=DEVICE))
            assert reward.device.type == DEVICE
    assert copies.found == waits.shapes == []
    *_, info = env.step(torch.empty(3, 4, 16, 16, device=DEVICE))
    assert info["ended"].all()
    if wrap is statistics:
        assert info["episode"]["r"].device.type == DEVICE
    env.reset(options={"reset_mask": info["ended"]})
