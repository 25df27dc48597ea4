"""SB3's environment is ours, lane by lane and step by step; SB3's own wrappers and callbacks work on it."""

import sys
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor, VecVideoRecorder

import diffusion_gym  # noqa: F401
from agents.adapters.sb3 import DenoisingActorCriticPolicy, DiffusionVecEnv


def steps_of(space, num_envs, count, seed=0):
    rng = np.random.default_rng(seed)
    low, high = (0.1, 0.9) if space.high.max() <= 1 else (-2.0, 2.0)
    return rng.uniform(low, high, (count, num_envs, *space.shape)).astype(np.float32)


@pytest.mark.parametrize("kind", ["denoising", "times"])
def test_it_is_the_torch_environment(make_vec_env, kind):
    adapted = make_vec_env(kind, monitored=False)
    plain = gym.make_vec(adapted.env.spec)
    adapted.seed(5)
    observation, expected = adapted.reset(), plain.reset(seed=5)[0]
    assert all(np.array_equal(observation[key], expected[key].numpy()) for key in expected)
    ended = 0
    for action in steps_of(adapted.action_space, 4, 10):
        observation, rewards, dones, infos = adapted.step(action)
        expected, reward, terminated, _, info = plain.step(torch.from_numpy(action))
        assert all(np.array_equal(observation[key], expected[key].numpy()) for key in expected)
        assert np.array_equal(rewards, reward.numpy())
        assert np.array_equal(dones, terminated.numpy())
        for lane in range(4):
            assert ("terminal_observation" in infos[lane]) == dones[lane]
            if dones[lane]:
                ended += 1
                last = infos[lane]["terminal_observation"]
                assert all(np.array_equal(last[key], info["final_obs"][key][lane].numpy()) for key in last)
                assert infos[lane]["TimeLimit.truncated"] is False
                assert infos[lane]["reward/brightness"] == rewards[lane]
                assert infos[lane]["nfe"] == info["final_info"]["nfe"][lane]
                assert adapted.observation_space.contains(last)
            assert adapted.observation_space.contains({key: value[lane] for key, value in observation.items()})
    assert ended >= 8


def test_the_next_reset_takes_seeds_and_options_and_forgets_them(make_vec_env):
    env = make_vec_env(monitored=False)
    env.seed(3)
    env.set_options([{"prompt_id": lane % 2} for lane in range(4)])
    first = env.reset()
    assert first["prompt_id"][:, 0].tolist() == [0, 1, 0, 1]
    assert [info["prompt_id"] for info in env.reset_infos] == [0, 1, 0, 1]
    second = env.reset()
    assert not np.array_equal(first["latents"], second["latents"])
    env.seed(3)
    env.set_options({"prompt_id": 1})
    third = env.reset()
    assert np.array_equal(first["latents"], third["latents"])
    assert third["prompt_id"][:, 0].tolist() == [1] * 4
    env.set_options([{"prompt_id": 1}, {}, {}, {}])
    with pytest.raises(ValueError, match=r"all lanes need the same options, got .*prompt_id"):
        env.reset()


def test_bounds_are_finite_and_an_action_that_would_be_clipped_raises(make_vec_env, mixture):
    env = make_vec_env(monitored=False)
    assert env.action_space.is_bounded()
    env.reset()
    action = np.zeros((4, *env.action_space.shape), dtype=np.float32)
    action[2, 0] = 1e3
    with pytest.raises(ValueError, match=r"reached the bound ±1000, where Stable-Baselines3 clips it"):
        env.step(action)
    wider = DiffusionVecEnv(gym.make_vec("DenoisingMDP-v0", num_envs=4, model=mixture), action_bound=1e4)
    wider.reset()
    wider.step(action)
    assert float(wider.action_space.high.max()) == 1e4


def test_times_keep_their_own_bounds(make_vec_env):
    env = make_vec_env("times", monitored=False)
    assert (env.action_space.low, env.action_space.high) == (0, 1)
    env.reset()
    env.step(np.ones((4, 1), dtype=np.float32))  # SB3's stock Gaussian policy is clipped there: it is its own to know


@pytest.mark.parametrize("mode", ["NEXT_STEP", "DISABLED"])
def test_other_autoreset_modes_are_refused(mixture, mode):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, model=mixture, autoreset_mode=mode)
    with pytest.raises(ValueError, match=f'autoreset_mode="SAME_STEP", got {mode}'):
        DiffusionVecEnv(env)


def test_other_things_are_refused(mixture):
    with pytest.raises(TypeError, match="env must be a torch vector environment"):
        DiffusionVecEnv(gym.make("DenoisingMDP-v0", model=mixture))
    with pytest.raises(ValueError, match=r"action_bound must be .*, got 0"):
        DiffusionVecEnv(gym.make_vec("DenoisingMDP-v0", num_envs=2, model=mixture), action_bound=0)


def test_attributes_and_methods_are_the_vector_environments(make_vec_env):
    env = make_vec_env(monitored=False)
    assert env.get_attr("num_steps") == [3] * 4
    assert env.get_attr("num_steps", [0, 2]) == [3] * 2
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 4
    assert env.env_method("reset", indices=0)[0][1]["nfe"].tolist() == [0] * 4
    env.set_attr("render_mode", "rgb_array")
    assert env.env.unwrapped.render_mode == "rgb_array"
    with pytest.raises(ValueError, match="leave indices out, got 1"):
        env.set_attr("render_mode", None, 1)
    assert not env.has_attr("nothing_of_the_kind")
    assert env.model is env.env.unwrapped.model
    env.close()
    assert env.env.closed


@pytest.mark.parametrize("kind", ["denoising", "times"])
def test_rollout_bytes_is_the_size_of_sb3s_buffer(make_vec_env, kind):
    env = make_vec_env(kind, monitored=False)
    buffer = PPO("MultiInputPolicy", env, n_steps=7, batch_size=7).rollout_buffer
    arrays = [*buffer.observations.values(), buffer.actions, buffer.rewards, buffer.returns, buffer.episode_starts]
    arrays += [buffer.values, buffer.log_probs, buffer.advantages]
    assert env.rollout_bytes(7) == sum(array.nbytes for array in arrays)


def test_sb3s_monitor_counts_returns_and_lengths(make_vec_env):
    env = make_vec_env()
    assert isinstance(env, VecMonitor)
    env.reset()
    for action in steps_of(env.action_space, 4, 3):
        _, rewards, dones, infos = env.step(action)
    assert dones.all()
    assert [info["episode"]["l"] for info in infos] == [3] * 4
    np.testing.assert_allclose([info["episode"]["r"] for info in infos], rewards, atol=1e-6)


def test_sb3s_recorder_films_x_0(make_vec_env, monkeypatch, tmp_path):
    """moviepy wants an old Pillow; here what it is given is looked at. `make plug-ins` writes a real film."""
    films = []

    class Clip:
        def __init__(self, frames, fps):
            films.append(SimpleNamespace(frames=frames, fps=fps))

        def write_videofile(self, path):
            films[-1].path = path

    parts = ["moviepy", "moviepy.video", "moviepy.video.io", "moviepy.video.io.ImageSequenceClip"]
    for name in parts:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[parts[-1]].ImageSequenceClip = Clip
    env = make_vec_env(monitored=False, render_mode="rgb_array")
    recorder = VecVideoRecorder(env, str(tmp_path), lambda step: step == 0, video_length=3)
    recorder.reset()
    actions = steps_of(env.action_space, 4, 3)
    for action in actions:
        _, _, _, infos = recorder.step(action)
    recorder.close()
    assert len(films) == 1
    assert films[0].fps == 10
    last = films[0].frames[3]
    image = (infos[0]["images"] * 255).round().transpose(1, 2, 0).astype(np.uint8)
    assert np.array_equal(last[: image.shape[0], : image.shape[1]], image)


def test_frames_are_none_without_a_render_mode(make_vec_env):
    env = make_vec_env(monitored=False)
    env.reset()
    with pytest.warns(UserWarning, match="needs render_mode"):
        assert env.get_images() == [None] * 4


def test_what_the_policy_does_is_what_the_environment_stores(make_vec_env, mixture):
    """In the environment's precision too: actions are rounded before they are scored."""
    env = make_vec_env(dtype=None)
    seen = []
    learner = PPO(
        DenoisingActorCriticPolicy, env, n_steps=3, batch_size=12, n_epochs=1, policy_kwargs={"model": mixture}
    )
    learner.learn(12, callback=lambda local, _: seen.append((local["actions"], local["clipped_actions"])) or True)
    assert len(seen) == 3
    assert all(np.array_equal(*pair) for pair in seen)
