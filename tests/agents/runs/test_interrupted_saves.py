"""A folder that a run is saved into is whole at all times, and keeps what is not the run's."""

import json

import gymnasium as gym
import pytest

import diffusion_gym  # noqa: F401
from agents import DDPOIS, Checkpoints, DenoisingPolicy, Rollouts


def make_env(model):
    return gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=3, model=model, reward="brightness")


def make(model):
    return DDPOIS(DenoisingPolicy(model, seed=0), make_env(model), rollouts=Rollouts(samples=4), batch_size=2, seed=3)


def test_a_failing_save_leaves_the_last_one_whole(mixture, tmp_path, monkeypatch):
    learner = make(mixture)
    learner.save(tmp_path / "run")
    before = json.loads((tmp_path / "run" / "training_state.json").read_text())
    learner.learn(12, log_interval=0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agents.runs.files.save_optimizer", full)
    with pytest.raises(OSError, match="No space left"):
        learner.save(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "training_state.json").read_text()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    DDPOIS.load(tmp_path / "run", make_env(mixture))


def test_a_kill_between_the_two_renames_loses_nothing(mixture, tmp_path):
    learner = make(mixture)
    learner.save(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "run.previous")  # where a kill would leave it
    (tmp_path / "run.partial").mkdir()
    assert DDPOIS.load(tmp_path / "run", make_env(mixture)).iteration == 0
    learner.learn(12, log_interval=0)
    learner.save(tmp_path / "run")
    assert DDPOIS.load(tmp_path / "run", make_env(mixture)).iteration == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_save_keeps_what_is_not_its_own(mixture, tmp_path):
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    learner = make(mixture)
    for _ in range(2):
        learner.save(run)
    assert (run / "notes.txt").read_text() == "mine"
    run.rename(tmp_path / "run.previous")  # where a kill after the two renames would leave it
    learner.save(tmp_path / "new")
    (tmp_path / "new").rename(run)
    learner.save(run)
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "evaluation").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    make(mixture).learn(12, Checkpoints(run, every=1), log_interval=0)
    assert DDPOIS.load(run, make_env(mixture)).iteration == 0  # the saved run, not the checkpoints beside it
