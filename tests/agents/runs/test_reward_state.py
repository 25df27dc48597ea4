"""A training whose reward is elsewhere, or remembers, is the training that it would be without."""

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DenoisingPolicy, Processes, Rollouts
from diffusion_gym.rewards import Normalised
from diffusion_gym.rewards.remote import RemoteReward
from tests.serving import free_port, is_there, wait_until

ROOT = Path(__file__).parents[3]
LANES, STEPS, ITERATIONS = 4, 3, 5
OUTAGE = 2.0


def make(reward):
    arguments = {"model": "mixture", "num_steps": STEPS, "prompts": ["anything", "north"]}
    env = gym.make_vec("DenoisingMDP-v0", num_envs=LANES, reward=reward, **arguments)
    policy = DenoisingPolicy(env.unwrapped.model, seed=0)
    return DDPOIS(policy, env, learning_rate=1e-3, rollouts=Rollouts(samples=2 * LANES), batch_size=LANES, seed=3)


class Returns(BaseCallback):
    """Keeps the rewards of all rollouts; does something before some of them."""

    def __init__(self, before=None):
        super().__init__()
        self.returns, self.before = [], before or {}

    def _on_rollout_start(self):
        self.before.get(len(self.returns), lambda: None)()

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.returns.append(self.locals["returns"].clone())


def train(reward, before=None):
    """Return the rewards of all rollouts, and the weights at the end."""
    algorithm, callback = make(reward), Returns(before)
    algorithm.learn(ITERATIONS * 2 * LANES * STEPS, callback, log_interval=0)
    return torch.stack(callback.returns), [parameter.detach() for parameter in algorithm.policy.parameters()]


class Supervisor:
    """Keeps a server process: `OUTAGE` seconds after its death there is another."""

    def __init__(self, reward, folder):
        self.port, self.poison = free_port(), folder / "poison"
        self.command = [
            sys.executable,
            str(Path(__file__).parent / "dying_server.py"),
            reward,
            str(self.port),
            str(self.poison),
        ]
        self.deaths, self.ending = [], threading.Event()

    def __enter__(self):
        self.process = self._start()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.ending.set()
        self.process.kill()
        self.thread.join(30)
        self.process.kill()
        self.process.wait(30)

    def _start(self):
        return subprocess.Popen(
            self.command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
        )

    def _watch(self):
        while True:
            code = self.process.wait()
            if self.ending.is_set():
                return
            self.deaths.append(code)
            if self.ending.wait(OUTAGE):
                return
            self.process = self._start()


def test_a_training_loses_nothing_when_its_reward_server_is_killed(tmp_path, caplog):
    """The server is killed between two requests, and again while it works on one; each time it is away for seconds."""
    expected, expected_weights = train("incompressibility")
    with Supervisor("incompressibility", tmp_path) as server, caplog.at_level(logging.WARNING):
        wait_until(lambda: is_there(server.port), seconds=120)
        reward = RemoteReward(f"remote://127.0.0.1:{server.port}")
        reward.num_retries = 0
        returns, weights = train(reward, {1: lambda: server.process.kill(), 3: server.poison.touch})
        assert server.deaths == [-signal.SIGKILL] * 2
    assert reward.num_retries >= 4
    assert f"reward server remote://127.0.0.1:{server.port}: ConnectionRefusedError" in caplog.text
    assert torch.equal(returns, expected)
    assert returns.shape == (ITERATIONS, 2 * LANES)
    assert returns.std() > 0
    assert all(torch.equal(one, other) for one, other in zip(weights, expected_weights, strict=True))


@pytest.mark.parametrize(("saved_after", "learnt_from"), [(2 * 2 * STEPS, 2 * LANES), (5 * STEPS + 1, 4 * LANES)])
def test_a_resumed_training_goes_on_with_what_its_reward_learnt(saved_after, learnt_from, tmp_path):
    """A rollout is of two batches; saved after the second, or the first, it is played again from its start."""
    total = ITERATIONS * 2 * LANES * STEPS
    whole = make(Normalised("brightness"))
    whole.learn(total, log_interval=0)

    first = make(Normalised("brightness"))
    saving = CheckpointCallback(save_freq=saved_after, save_path=str(tmp_path), name_prefix="run")
    first.learn(3 * 2 * LANES * STEPS, saving, log_interval=0)
    saved = min(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)
    env = make(Normalised("brightness")).env
    resumed = DDPOIS.load(saved, env)
    assert env.unwrapped.reward.count == learnt_from
    resumed.learn(total - resumed.num_timesteps, log_interval=0, reset_num_timesteps=False)
    assert env.unwrapped.reward.state_dict() == whole.env.unwrapped.reward.state_dict()
    pairs = zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ValueError, match="'brightness' remembers nothing"):
        DDPOIS.load(saved, make("brightness").env)


def test_many_processes_refuse_a_reward_that_each_would_learn_for_itself(monkeypatch):
    class TwoProcesses(Processes):
        def __init__(self):
            super().__init__()
            self.count = 2

        def from_main(self, value):
            return value

        def join(self, parameters):
            pass

    monkeypatch.setattr("agents.training.algorithm.Processes", TwoProcesses)
    with pytest.raises(ValueError, match="each process would have its own statistics of the reward 'normalised_bright"):
        make(Normalised("brightness"))
    assert make(Normalised("brightness", mean=0.5, std=0.1)).processes.count == 2
