"""Environments stay on the device: on a fake one, where mixing devices and waits outside `to_host` raise."""

import contextlib

import gymnasium as gym
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import diffusion_gym  # noqa: F401
from diffusion_gym.envs.lanes import Lanes
from diffusion_gym.envs.time_prediction import TimePredictionVectorEnv
from tests.fake_device import DEVICE, BlockingCopies, Waits, move, on_the_host


@pytest.fixture
def on_device(monkeypatch):
    """Return a function that enters the fake mode, and puts an environment on its device."""
    with contextlib.ExitStack() as stack:
        on_the_host(monkeypatch, Lanes, "_draw")
        on_the_host(monkeypatch, TimePredictionVectorEnv, "_time_of")

        def enter(env):
            model = env.unwrapped.model
            networks = [model._vae, model._text_encoder, model.denoiser]
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            model._rows.clear()
            model.schedule._tables.clear()
            for network in networks:
                move(network)
            for owner in (model, env.unwrapped):
                owner.device = torch.device(DEVICE)

        yield enter


@pytest.fixture
def waits(monkeypatch):
    return Waits(monkeypatch)


def make(reward="brightness", **arguments):
    return gym.make_vec("DenoisingMDP-v0", num_envs=3, num_steps=2, reward=reward, **arguments)


def test_the_fake_device_catches_what_it_should(on_device):
    on_device(make())
    values = torch.empty(3, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        _ = values + torch.empty(3)
    with pytest.raises(DataDependentOutputException):
        bool(values.sum() > 0)
    with BlockingCopies() as copies:
        torch.zeros(3).to(DEVICE, non_blocking=True)
        assert not copies.found
        torch.zeros(3).to(DEVICE)
        torch.empty(3, device=DEVICE).copy_(torch.zeros(3))
    assert len(copies.found) == 2


def test_no_blocking_copy_in_a_middle_step_of_denoising(on_device, waits):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=3, num_steps=4, reward="brightness")
    on_device(env)
    env.reset(seed=0)
    with BlockingCopies() as copies:
        env.step(torch.empty(3, 4, 16, 16, device=DEVICE))
    assert copies.found == waits.shapes == []


def test_no_blocking_copy_in_a_middle_step_of_time_prediction(on_device, waits):
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=3, reward="brightness")
    on_device(env)
    env.reset(seed=0)
    env.step(torch.empty(3, 1, device=DEVICE))  # the schedule's tables are sent once
    with BlockingCopies() as copies:
        env.step(torch.empty(3, 1, device=DEVICE))
    assert copies.found == []


@pytest.mark.parametrize("mode", ["SAME_STEP", "NEXT_STEP", "DISABLED"])
def test_an_episode_waits_where_the_reward_is_computed_alone(on_device, waits, mode):
    env = make(autoreset_mode=mode)
    on_device(env)
    observation, info = env.reset(seed=0)
    for _ in range(2):
        assert not info["ended"].any()
        assert waits.shapes == []
        assert {value.device.type for value in observation.values()} == {DEVICE}
        observation, reward, terminated, truncated, info = env.step(torch.empty(3, 4, 16, 16, device=DEVICE))
        assert {reward.device.type, terminated.device.type, truncated.device.type} == {DEVICE}
    assert info["ended"].all()
    assert waits.shapes == [(2, 3), (3,)]  # whether actions and images were finite, and whether rewards are


def test_time_prediction_waits_once_a_step_for_the_ratios(on_device, waits):
    """The lanes of the fake device all walk at one pace."""
    waits.number = 0.01
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=3, reward="brightness", autoreset_mode="DISABLED")
    on_device(env)
    env.reset(seed=0)
    for _ in range(2):
        observation, reward, _, _, info = env.step(torch.empty(3, 1, device=DEVICE))
        assert {value.device.type for value in (*observation.values(), reward)} == {DEVICE}
    assert info["ended"].all()
    assert waits.shapes == [(3,), (3,), (2, 3), (3,)]


def test_a_reward_that_waits_is_caught(on_device, waits):
    def impatient(images, prompts, metadata):
        return images.mean((1, 2, 3)) * float(images.max())

    env = make(impatient)
    on_device(env)
    env.reset(seed=0)
    env.step(torch.empty(3, 4, 16, 16, device=DEVICE))
    with pytest.raises(DataDependentOutputException):
        env.step(torch.empty(3, 4, 16, 16, device=DEVICE))
