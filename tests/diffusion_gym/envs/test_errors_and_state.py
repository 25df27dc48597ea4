"""What an error leaves behind: state vouches only for what was done, and every lane is started anew after it."""

import gc
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode

import diffusion_gym  # noqa: F401
from diffusion_gym.models import load_model

IDS = {"DenoisingMDP-v0": {"num_steps": 2}, "TimePredictionMDP-v0": {"max_steps": 2}}
ONE_LANE = {"reset_mask": np.array([True, False, False])}


def make(env_id, model, reward="brightness", **arguments):
    return gym.make_vec(env_id, num_envs=3, model=model, reward=reward, **IDS[env_id], **arguments)


def actions_of(env):
    return torch.full((env.num_envs, *env.single_action_space.shape), 0.5)


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_after_a_failed_reward_every_lane_is_reset(mixture, env_id, mode):
    failures = [True]

    def flaky(images, prompts, metadata):
        if failures:
            raise ConnectionError(f"attempt {failures.pop()}")
        return images.mean((1, 2, 3))

    env = make(env_id, mixture, flaky, autoreset_mode=mode)
    env.reset(seed=0)
    env.step(actions_of(env))
    with pytest.raises(ConnectionError):
        env.step(actions_of(env))
    with pytest.raises(ResetNeeded, match="reset after an error must be of all lanes"):
        env.reset(options=ONE_LANE)
    with pytest.raises(ResetNeeded, match=r"last step or reset ended in an error: call reset\(\) of all lanes"):
        env.step(actions_of(env))
    _, info = env.reset(seed=0)
    assert info["nfe"].tolist() == [0, 0, 0]
    env.step(actions_of(env))
    _, reward, _, _, info = env.step(actions_of(env))
    assert info["ended"].all()
    assert (reward > 0).all()


@pytest.mark.parametrize("options", [None, ONE_LANE])
def test_a_reset_that_fails_leaves_nothing_to_step(mixture, monkeypatch, options):
    env = make("TimePredictionMDP-v0", mixture)
    env.reset(seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(mixture, "denoise", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            env.reset(options=options)
    with pytest.raises(ResetNeeded, match="last step or reset ended in an error"):
        env.step(actions_of(env))
    with pytest.raises(ResetNeeded, match="of all lanes"):
        env.reset(options=ONE_LANE)
    assert env.reset(seed=0)[1]["nfe"].tolist() == [0, 0, 0]
    env.step(actions_of(env))


def test_a_first_reset_that_fails_is_none(mixture, monkeypatch):
    env = make("TimePredictionMDP-v0", mixture)
    with monkeypatch.context() as patch:
        patch.setattr(mixture, "denoise", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            env.reset()
    with pytest.raises(ResetNeeded, match=r"call reset\(\) before step"):
        env.step(actions_of(env))


def test_wrong_options_and_actions_interrupt_nothing(mixture):
    env = make("DenoisingMDP-v0", mixture)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="reset option"):
        env.reset(options={"promt": "north"})
    with pytest.raises(gym.error.InvalidAction):
        env.step(torch.zeros(1))
    env.step(actions_of(env))


@pytest.mark.parametrize("env_id", IDS)
def test_environments_that_could_not_be_made_are_closed_without_a_word(env_id, monkeypatch, mixture):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: said.append(unraisable.exc_value))
    for wrong in ({"num_envs": 0}, {"reward": "nothing"}, {"model": "nobody"}, {"num_steps": 0}, {"max_steps": 0}):
        with pytest.raises((ValueError, TypeError, FileNotFoundError)):
            gym.make_vec(env_id, **{"num_envs": 1, "model": mixture, **wrong})
    gc.collect()
    assert said == []


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("load", [lambda: load_model("mixture"), lambda: load_model("emoji")], ids=["mixture", "emoji"])
def test_what_is_made_in_inference_mode_can_be_trained_on(env_id, load):
    with torch.inference_mode():
        env = gym.make_vec(env_id, num_envs=2, model=load(), reward="brightness", **IDS[env_id])
        observation, _ = env.reset(seed=0)
        for _ in range(2):
            observation, *_ = env.step(actions_of(env))
    floats = {key: value for key, value in observation.items() if value.is_floating_point()}
    weight = torch.ones(1, requires_grad=True)
    sum((weight * value).square().sum() for value in floats.values()).backward()
    assert torch.isfinite(weight.grad).all()


FORKED = """
import os, sys, time
import torch
import diffusion_gym.envs.denoising

torch.set_num_threads(2)
work = lambda: torch.randn(1_000_000).exp().sum()
work()  # starts the threads that a forked child does not have
child = os.fork()
if not child:
    work()
    os._exit(0)
for _ in range(600):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        assert torch.get_num_threads() == 2
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("the child hangs")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_worker_does_not_hang():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", FORKED], check=True, env=environment, timeout=120)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_asynchronous_vectorisation_runs():
    code = (
        "import gymnasium as gym, torch, diffusion_gym\n"
        "torch.set_num_threads(2)\n"
        "env = gym.make_vec('DenoisingMDP-v0', num_envs=2, vectorization_mode='async', num_steps=1)\n"
        "env.reset(seed=0)\n"
        "assert (env.step(env.action_space.sample())[1] > 0).all()\n"
        "env.close()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(("env_id", "name"), [("DenoisingMDP-v0", "num_steps"), ("TimePredictionMDP-v0", "max_steps")])
def test_a_time_limit_that_hides_the_reward_is_warned_of(env_id, name, mixture, recwarn):
    cut = gym.make(env_id, model=mixture, max_episode_steps=4, **{name: 5})
    with pytest.warns(UserWarning, match=r"max_episode_steps=4 cuts episodes, which take up to 5 steps"):
        cut.reset(seed=0)
    with pytest.warns(UserWarning, match="max_episode_steps=4"):
        gym.wrappers.TimeLimit(gym.make(env_id, model=mixture, **{name: 5}), 4).reset(seed=0)
    recwarn.clear()
    cut.reset(seed=0)
    gym.make(env_id, model=mixture, max_episode_steps=5, **{name: 5}).reset(seed=0)
    gym.make(env_id, model=mixture, **{name: 5}).reset(seed=0)
    assert not [w for w in recwarn if "max_episode_steps" in str(w.message)]
