"""Episode statistics on the device equal Gymnasium's, and never wait for it."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import diffusion_gym  # noqa: F401
from diffusion_gym import transfer
from diffusion_gym.testing import check_vector_env
from diffusion_gym.wrappers import EpisodeStatistics, NumpyToTorch
from tests.diffusion_gym.testing.walk import Walk

MODES = list(AutoresetMode)


@pytest.mark.parametrize("mode", MODES)
def test_they_equal_gymnasiums(mode):
    """The walk pays in every step, and its episodes differ in length."""
    ours, theirs = EpisodeStatistics(NumpyToTorch(Walk(mode))), RecordEpisodeStatistics(Walk(mode))
    for env in (ours, theirs):
        env.reset(seed=5)
        env.action_space.seed(5)
    ended_lanes = 0
    for _ in range(20):
        actions = ours.action_space.sample()
        *_, info = ours.step(torch.from_numpy(actions))
        _, _, ended, _, expected = theirs.step(actions.copy())
        assert ("episode" in info) == ("episode" in expected) == ended.any()
        if "episode" in info:
            np.testing.assert_array_equal(info["_episode"], expected["_episode"])
            np.testing.assert_allclose(info["episode"]["r"].numpy(), expected["episode"]["r"], rtol=1e-5)
            np.testing.assert_array_equal(info["episode"]["l"], expected["episode"]["l"])
            assert ((info["episode"]["t"] > 0) == info["_episode"]).all()
            ended_lanes += int(ended.sum())
        if mode is AutoresetMode.DISABLED and ended.any():
            ours.reset(options={"reset_mask": ended.copy()})
            theirs.reset(options={"reset_mask": ended.copy()})
    assert ended_lanes >= 12


@pytest.mark.parametrize("mode", MODES)
def test_the_environment_behind_them_passes_the_check(mode):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=3, model="mixture", num_steps=2, autoreset_mode=mode)
    assert check_vector_env(EpisodeStatistics(env)).weaknesses == {}


def test_lanes_that_rest_are_counted_once():
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=3, model="mixture", max_steps=4, autoreset_mode="DISABLED")
    env = EpisodeStatistics(env)
    env.reset(seed=0)
    episodes, ended = np.zeros(3, int), np.zeros(3, bool)
    while not ended.all():
        *_, info = env.step(torch.tensor([[0.001], [0.5], [0.9]]))
        ended = info["ended"]
        episodes += info.get("_episode", 0)
    assert episodes.tolist() == [1, 1, 1]


def test_no_step_waits_but_the_environments(monkeypatch):
    env = EpisodeStatistics(gym.make_vec("DenoisingMDP-v0", num_envs=3, model="mixture", num_steps=3))
    env.reset(seed=0)
    waits = []
    to_host = transfer.to_host
    monkeypatch.setattr(transfer, "to_host", lambda tensor: waits.append(tensor) or to_host(tensor))
    for _ in range(2):
        env.step(torch.zeros(3, 2, 1, 1))
    assert waits == []


def test_an_environment_that_does_not_say_who_ended_is_refused():
    env = EpisodeStatistics(Walk(AutoresetMode.SAME_STEP))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r'info must have "ended".*NumpyToTorch; got info with \[.*steps'):
        env.step(np.zeros((3, 2), np.float32))
