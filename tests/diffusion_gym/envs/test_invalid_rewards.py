"""What is NaN is never rewarded, in either environment: it raises by name, or comes back as NaN for its lanes alone."""

import contextlib

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction
from gymnasium.vector import AutoresetMode

import diffusion_gym  # noqa: F401
from diffusion_gym.models import load_model
from diffusion_gym.rewards import RewardOutput, make_reward

SHAPE = (4, 16, 16)
IDS = {"DenoisingMDP-v0": {"num_steps": 1}, "TimePredictionMDP-v0": {"max_steps": 1}}


def make(env_id, model, reward="incompressibility", num_envs=3, **arguments):
    return gym.make_vec(env_id, num_envs=num_envs, model=model, reward=reward, **IDS[env_id], **arguments)


def actions_of(env):
    noise = torch.rand(env.num_envs, *env.single_action_space.shape, generator=torch.Generator().manual_seed(0))
    return noise / 2 + 0.25


def last_of(info):
    return info.get("final_info", info)


@pytest.fixture
def broken_in_lane_1(emoji, monkeypatch):
    """The emoji model with a decoder that overflows for the second of the images that it is given."""
    decode = type(emoji).decode

    def overflowing(self, latents):
        images = decode(self, latents)
        images[1, 0, 0, 0] = torch.nan
        return images

    monkeypatch.setattr(type(emoji), "decode", overflowing)
    return emoji


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("deferred", [False, True])
def test_a_nan_image_raises_by_lane_before_the_reward_is_asked(broken_in_lane_1, env_id, deferred):
    asked = []
    env = make(env_id, broken_in_lane_1, lambda images, *_: asked.append(len(images)) or images.mean((1, 2, 3)))
    env.reset(seed=0)
    message = r"images of lanes \[1\] are NaN or infinite.*float16.*bfloat16"
    in_thread = env.unwrapped.deferred_rewards() if deferred else contextlib.nullcontext()
    with in_thread, pytest.raises(ValueError, match=message):
        env.step(actions_of(env))
    assert asked == []


@pytest.mark.parametrize("reward", ["compressibility", "incompressibility", "brightness"])
def test_a_denoiser_that_overflows_is_never_paid(reward):
    model = load_model("emoji")
    next(model.denoiser.parameters()).data.view(-1)[0] = torch.nan
    env = make("TimePredictionMDP-v0", model, reward)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"images of lanes \[0, 1, 2\] are NaN"):
        env.step(actions_of(env))


def test_finite_latents_outside_the_decoders_range_are_never_paid(emoji):
    env = make("DenoisingMDP-v0", emoji)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"images of lanes \[0, 1, 2\] are NaN"):
        env.step(torch.full((3, *SHAPE), 1e20))


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("deferred", [False, True])
def test_with_nan_the_other_lanes_keep_their_rewards(broken_in_lane_1, env_id, mode, deferred):
    shown = []

    def reward(images, prompts, metadata):
        assert torch.isfinite(images).all()
        shown.append(list(prompts))
        return images.mean((1, 2, 3))

    env = make(env_id, broken_in_lane_1, reward, on_invalid_reward="nan", autoreset_mode=mode)
    _, info = env.reset(seed=0)
    texts = [env.unwrapped.prompts[i] for i in info["prompt_id"]]
    if deferred:
        with env.unwrapped.deferred_rewards():
            *_, info = env.step(actions_of(env))
            rewards, named = last_of(info)["pending_rewards"].result()
    else:
        _, rewards, _, _, info = env.step(actions_of(env))
        named = last_of(info)
    assert rewards.isnan().tolist() == [False, True, False]
    assert named["reward_invalid"].tolist() == [False, True, False]
    assert named["reward/reward"].isnan().tolist() == [False, True, False]
    assert shown == [[texts[0], texts[2]]]
    expected = last_of(info)["images"].mean((1, 2, 3))
    torch.testing.assert_close(rewards[[0, 2]], expected[[0, 2]])
    env.step(actions_of(env)) if mode is not AutoresetMode.DISABLED else env.reset()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rewards_that_are_not_finite(emoji, value):
    def reward(images, prompts, metadata):
        values = images.mean((1, 2, 3))
        values[2] = value
        return values

    env = make("DenoisingMDP-v0", emoji, reward)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"'reward' returned NaN or infinity for lanes \[2\]"):
        env.step(actions_of(env))
    env = make("DenoisingMDP-v0", emoji, reward, on_invalid_reward="nan")
    env.reset(seed=0)
    _, rewards, _, _, info = env.step(actions_of(env))
    assert rewards.isnan().tolist() == info["final_info"]["reward_invalid"].tolist() == [False, False, True]


def test_actions_that_are_not_finite_are_invalid_too(emoji):
    env = make("DenoisingMDP-v0", emoji, on_invalid_reward="nan")
    env.reset(seed=0)
    actions = actions_of(env)
    actions[0, 0, 0, 0] = torch.inf
    _, rewards, _, _, info = env.step(actions)
    assert rewards.isnan().tolist() == info["final_info"]["reward_invalid"].tolist() == [True, False, False]
    env = make("DenoisingMDP-v0", emoji)
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match=r"lanes \[0\] were NaN or infinite.*float16"):
        env.step(actions)


def test_where_every_image_is_nan_the_reward_is_not_asked():
    model = load_model("emoji")
    next(model.denoiser.parameters()).data.view(-1)[0] = torch.nan
    env = make("TimePredictionMDP-v0", model, lambda *_: 1 / 0, on_invalid_reward="nan")
    env.reset(seed=0)
    _, rewards, _, _, info = env.step(actions_of(env))
    assert rewards.isnan().all()
    assert info["final_info"]["reward_invalid"].all()


def test_the_single_environment_says_it(emoji):
    env = gym.make("DenoisingMDP-v0", model=emoji, num_steps=1, on_invalid_reward="nan").unwrapped
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(np.full(SHAPE, 1e20, np.float32))
    assert terminated
    assert np.isnan(reward)
    assert info["reward_invalid"] is True


def test_its_names_are_checked(emoji):
    with pytest.raises(ValueError, match=r"on_invalid_reward must be one of \('raise', 'nan'\), got 'skip'"):
        make("DenoisingMDP-v0", emoji, on_invalid_reward="skip")


def test_values_on_another_device_are_named(emoji):
    class Elsewhere(type(make_reward("brightness"))):
        def __call__(self, images, prompts, metadata=None):
            return RewardOutput(torch.zeros(len(images), device="meta"))

    env = make("DenoisingMDP-v0", emoji, Elsewhere())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"values of the reward 'brightness' must be on .* device, cpu; got meta"):
        env.step(actions_of(env))
