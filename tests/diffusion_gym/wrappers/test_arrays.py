"""Torch environments as NumPy's and the other way round, and Gymnasium's own wrappers behind them."""

import copy
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from gymnasium.wrappers import vector as gymnasium_wrappers

import diffusion_gym  # noqa: F401
from diffusion_gym.testing import check_vector_env
from diffusion_gym.wrappers import NumpyToTorch, TorchToNumpy
from tests.diffusion_gym.testing.walk import Walk

MODES = list(AutoresetMode)
NUM_STEPS = 3


def make(mode=AutoresetMode.SAME_STEP, **options):
    options = {"num_envs": 3, "model": "mixture", "num_steps": NUM_STEPS, "reward": "brightness", **options}
    return gym.make_vec("DenoisingMDP-v0", autoreset_mode=mode, **options)


def play(env, num_steps, seed=0):
    """Return what `num_steps` steps return, with resets of lanes that ended where these are not automatic."""
    env.reset(seed=seed)
    env.action_space.seed(seed)
    results = []
    for _ in range(num_steps):
        results.append(copy.deepcopy(env.step(env.action_space.sample())))
        ended = results[-1][2] | results[-1][3]
        if env.metadata["autoreset_mode"] is AutoresetMode.DISABLED and ended.any():
            env.reset(options={"reset_mask": ended})
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("env_id", ["DenoisingMDP-v0", "TimePredictionMDP-v0"])
def test_the_torch_environments_pass_the_check_as_numpy(env_id, mode):
    length = {"num_steps": NUM_STEPS} if env_id == "DenoisingMDP-v0" else {"max_steps": NUM_STEPS}
    env = gym.make_vec(env_id, num_envs=3, model="mixture", autoreset_mode=mode, **length)
    report = check_vector_env(TorchToNumpy(env))
    assert report.weaknesses == {}
    assert set(report.unchecked) == {"the single environment does the same, final observation and info too"}


@pytest.mark.parametrize("mode", MODES)
def test_numpy_environments_pass_the_check_as_torch(mode):
    for env in (
        Walk(mode),
        gym.make_vec("Blackjack-v1", 2, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}),
    ):
        report = check_vector_env(NumpyToTorch(env))
        assert "the same seed and actions: the same episodes, to the last bit" in report.holds
        assert "the caller's options are left alone" not in report.weaknesses


def test_data_are_equal_whichever_way():
    torch_env, numpy_env = make(), TorchToNumpy(make())
    torch_env.reset(seed=3)
    numpy_env.reset(seed=3)
    for _ in range(NUM_STEPS):
        actions = numpy_env.action_space.sample()
        expected = torch_env.step(torch.from_numpy(actions))
        observation, reward, terminated, truncated, info = numpy_env.step(actions)
        for key, value in expected[0].items():
            np.testing.assert_array_equal(observation[key], value.numpy())
        for got, value in zip((reward, terminated, truncated), expected[1:4], strict=True):
            np.testing.assert_array_equal(got, value.numpy())
    np.testing.assert_array_equal(info["final_obs"][1]["latents"], expected[4]["final_obs"]["latents"][1].numpy())
    np.testing.assert_array_equal(info["final_info"]["images"], expected[4]["final_info"]["images"].numpy())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_what_the_space_says(dtype):
    env = TorchToNumpy(make(dtype=dtype))
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    observation, *_ = env.step(env.action_space.sample())
    assert observation["latents"].dtype == np.float32


class SaysTexts(VectorWrapper):
    def step(self, actions):
        *result, info = super().step(actions)
        texts = {"prompt": ["a", "b", "ü"], "caption": np.array(["a", None, "b"], dtype=object), "why": "text"}
        return *result, info | texts | {"deeper": {"prompt": "a fox"}}


def test_texts_in_info_are_left_alone():
    env = TorchToNumpy(SaysTexts(make()))
    env.reset(seed=0)
    *_, info = env.step(env.action_space.sample())
    assert info["prompt"] == ["a", "b", "ü"]
    assert info["caption"].tolist() == ["a", None, "b"]
    assert info["why"] == "text"
    assert info["deeper"] == {"prompt": "a fox"}


def test_texts_stay_texts_as_torch():
    class Speaks(Walk):
        def info(self):
            return super().info() | {"name": np.array(["a", "b", "c"], dtype=object)}

    env = NumpyToTorch(Speaks(AutoresetMode.SAME_STEP))
    observation, info = env.reset(seed=0)
    assert isinstance(observation["position"], torch.Tensor)
    assert info["name"].tolist() == ["a", "b", "c"]


def test_numpy_actions_have_the_spaces_dtype():
    env = NumpyToTorch(SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2, autoreset_mode=AutoresetMode.SAME_STEP))
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(torch.tensor([1, 0], dtype=torch.int32))
    assert (reward.dtype, terminated.dtype) == (torch.float32, torch.bool)
    assert info["ended"].tolist() == [False, False]
    while not info["ended"].any():
        *_, info = env.step(torch.ones(2, dtype=torch.long))
    lane = int(np.flatnonzero(info["ended"])[0])
    assert info["final_obs"].shape == (2, 4)
    assert info["final_obs"][lane].abs().max() > 0.2  # the pole fell


@pytest.mark.parametrize("mode", MODES)
def test_gymnasiums_record_episode_statistics_works_behind_it(mode):
    env = gymnasium_wrappers.RecordEpisodeStatistics(TorchToNumpy(make(mode)))
    per_episode = NUM_STEPS + (mode is AutoresetMode.NEXT_STEP)
    results = play(env, 2 * per_episode)
    ends = [(reward, info) for _, reward, ended, _, info in results if ended.any()]
    assert len(ends) == 2
    for reward, info in ends:
        assert info["_episode"].all()
        np.testing.assert_array_equal(info["episode"]["l"], NUM_STEPS)
        np.testing.assert_allclose(info["episode"]["r"], reward, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_gymnasiums_normalize_reward_works_behind_it(mode):
    env = gymnasium_wrappers.NormalizeReward(TorchToNumpy(make(mode)), gamma=1.0)
    rewards = np.stack([reward for _, reward, *_ in play(env, 12)])
    assert np.isfinite(rewards).all()
    assert (rewards != 0).any(axis=0).all()


@pytest.mark.parametrize("mode", MODES)
def test_gymnasiums_transform_reward_works_bare_and_behind_it(mode):
    bare = gymnasium_wrappers.TransformReward(make(mode), lambda reward: 2 * reward)
    behind = gymnasium_wrappers.TransformReward(TorchToNumpy(make(mode)), lambda reward: 2 * reward)
    plain = TorchToNumpy(make(mode))
    for (_, doubled, *_), (_, reward, *_) in zip(play(behind, NUM_STEPS), play(plain, NUM_STEPS), strict=True):
        np.testing.assert_array_equal(doubled, 2 * reward)
    bare.reset(seed=0)
    _, reward, *_ = bare.step(torch.zeros(3, 2, 1, 1))
    assert isinstance(reward, torch.Tensor)


@pytest.mark.parametrize("name", ["RecordEpisodeStatistics", "NormalizeReward"])
def test_those_two_do_not_work_on_tensors(name):
    """If they do one day, the docs need not name a wrapper to put before them."""
    env = getattr(gymnasium_wrappers, name)(make())
    env.reset(seed=0)
    with pytest.raises((TypeError, RuntimeError)):
        [env.step(torch.zeros(3, 2, 1, 1)) for _ in range(NUM_STEPS)]


@pytest.fixture
def clips(monkeypatch):
    """The frames of the videos that moviepy would write: it is no dependency of the tests."""
    written = []

    class ImageSequenceClip:
        def __init__(self, frames, fps):
            written.append(list(frames))

        def write_videofile(self, path, **options):
            pass

        def close(self):
            pass

    names = ("moviepy", "moviepy.video", "moviepy.video.io", "moviepy.video.io.ImageSequenceClip")
    for name in names:
        module = types.ModuleType(name)
        module.ImageSequenceClip = ImageSequenceClip
        monkeypatch.setitem(sys.modules, name, module)
    return written


def test_gymnasiums_record_video_works_on_the_single_environment(clips, tmp_path):
    options = {"model": "emoji", "num_steps": 2, "reward": "brightness", "render_mode": "rgb_array"}
    env = gym.wrappers.RecordVideo(
        gym.make("DenoisingMDP-v0", **options), str(tmp_path / "videos"), episode_trigger=lambda _: True
    )
    env.reset(seed=0)
    last = None
    for _ in range(2):
        *_, info = env.step(env.action_space.sample())
        last = info.get("images", last)
    env.close()
    assert len(clips) == 1
    assert len(clips[0]) == 3
    np.testing.assert_array_equal(clips[0][-1], np.round(last.transpose(1, 2, 0) * 255).astype(np.uint8))


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("behind", [False, True])
def test_gymnasiums_record_video_works_on_the_vector_environment(clips, tmp_path, mode, behind):
    env = make(mode, model="emoji", num_envs=2, num_steps=2, render_mode="rgb_array")
    env = TorchToNumpy(env) if behind else env
    env = gymnasium_wrappers.RecordVideo(env, str(tmp_path / "videos"), episode_trigger=lambda episode: episode == 0)
    env.reset(seed=0)
    for _ in range(2):
        actions = env.action_space.sample()
        env.step(actions if behind else torch.from_numpy(actions))
    env.close()
    assert len(clips) == 1
    assert len(clips[0]) == 3


def test_record_video_leaves_out_the_last_frame_in_same_step_and_says_so(clips, tmp_path):
    env = make(model="emoji", num_envs=2, num_steps=2, render_mode="rgb_array")
    with pytest.warns(UserWarning, match="will not contain the last frame"):
        env = gymnasium_wrappers.RecordVideo(
            env, str(tmp_path / "videos"), episode_trigger=lambda episode: episode == 0
        )
    env.reset(seed=0)
    for _ in range(2):
        env.step(torch.from_numpy(env.action_space.sample()))
    env.close()
    assert len(clips[0]) == 2


def test_the_single_environments_wrappers_work_as_they_are():
    env = gym.make("DenoisingMDP-v0", model="mixture", num_steps=NUM_STEPS, reward="brightness")
    env = gym.wrappers.TransformReward(env, lambda reward: 3 * reward)
    env = gym.wrappers.NormalizeReward(gym.wrappers.RecordEpisodeStatistics(env))
    env.reset(seed=0)
    for _ in range(NUM_STEPS):
        _, reward, terminated, _, info = env.step(env.action_space.sample())
    assert terminated
    assert info["episode"]["l"] == NUM_STEPS
    assert info["episode"]["r"] == pytest.approx(3 * info["reward/brightness"])
    assert np.isfinite(reward)
