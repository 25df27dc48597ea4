"""Two processes on gloo against one with the same rollout and batch sizes: see `two_processes.py`."""

import json
import logging
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from agents import Processes
from tests.launching import launcher

from . import two_processes as work

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Return the folder that two processes write to, and a function that waits for them."""
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher(), "-m", "tests.agents.updates.two_processes", str(folder)]
    output = (folder / "output").open("w")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def wait():
        assert process.wait(timeout=300) == 0, (folder / "output").read_text()
        return folder

    yield wait
    if process.poll() is None:
        process.terminate()  # the launcher ends its workers, which are sessions of their own
        process.wait()
    output.close()


@pytest.fixture(scope="module")
def alone(launched, tmp_path_factory):
    """Return the folder of one process, which works while the two do."""
    folder = tmp_path_factory.mktemp("one")
    work.main(folder)
    return folder


@pytest.fixture(scope="module")
def together(alone, launched):
    return launched()


def distance(ours, reference):
    """Return the largest difference of the gradients (or weights), relative to their norm."""
    assert ours.keys() == reference.keys()
    largest = 0.0
    for prefix in {name.rpartition("/")[0] for name in reference if "/" in name}:
        names = [name for name in reference if name.rpartition("/")[0] == prefix]
        one, other = (torch.cat([values[name].flatten() for name in names]) for values in (ours, reference))
        largest = max(largest, float((one - other).norm() / other.norm()))
    return largest


@pytest.mark.parametrize("name", work.CASES)
def test_two_processes_have_the_gradients_and_weights_of_one(alone, together, name):
    expected = load_file(alone / f"{name}-0.safetensors")
    for rank in range(2):
        found = load_file(together / f"{name}-{rank}.safetensors")
        assert found["counters"].tolist() == expected["counters"].tolist()
        assert distance(found, expected) < 1e-5


def test_advantages_of_each_process_by_itself_would_be_found(alone, together):
    expected = load_file(alone / "ddpo-sf-0.safetensors")
    for rank in range(2):
        assert distance(load_file(together / f"broken-{rank}.safetensors"), expected) > 0.1


@pytest.mark.parametrize("name", work.CASES)
def test_the_log_is_that_of_one_process_and_written_once(alone, together, name):
    expected, found, other = (
        [json.loads(line) for line in (folder / name / log / "progress.json").read_text().splitlines()]
        for folder, log in ((alone, "log0"), (together, "log0"), (together, "log1"))
    )
    assert len(expected) == len(found) == work.ITERATIONS
    assert other == []
    for ours, reference in zip(found, expected, strict=True):
        assert ours.keys() == reference.keys()
        for key in reference:
            if not key.startswith("time/") or key in ("time/total_timesteps", "time/reward_queries"):
                assert ours[key] == pytest.approx(reference[key], rel=1e-3, abs=1e-6, nan_ok=True), key


@pytest.fixture(scope="module")
def special(alone, together):
    """Return the results of one process, and of the two."""
    files = [alone / "special-0.json", together / "special-0.json", together / "special-1.json"]
    return [json.loads(file.read_text()) for file in files]


def test_one_process_that_stops_stops_all_after_the_rollout(special):
    assert [results["one_stops_for_all"] for results in special] == [special[0]["one_stops_for_all"]] * 3


def test_all_start_with_the_main_process_s_seed_and_weights(special):
    expected, main, other = (results["all_start_alike"] for results in special)
    assert main == other
    assert main[1:] == expected[1:]


def test_an_update_that_one_process_finds_infinite_is_left_out_by_all(special):
    expected, main, other = (results["a_loss_is_infinite_in_one"] for results in special)
    assert main == other == expected
    assert expected[:2] == [1, 0]


def test_a_folder_that_all_were_given_is_learnt_once(special):
    expected, main, other = (results["learn_from_a_folder"] for results in special)
    assert main == other == pytest.approx(expected, rel=1e-5)


def test_samples_that_cannot_be_shared_are_named(special):
    message = "a rollout's samples must be a multiple of the environment's num_envs (4) × 2 processes, got 12"
    said = [results["too_few_samples"] for results in special]
    assert said[0] is None
    assert [error.partition(";")[0] for error in said[1:]] == [message, message]


def test_saved_runs_go_on_in_all_processes_whether_all_save_or_the_main_one(special):
    expected, main, other = (results["go_on"] for results in special)
    for ours, reference in zip(main, expected, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-6)
    assert main == other


def test_the_main_process_alone_writes_files(alone, together):
    ours, reference = (
        sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        for folder in (alone, together)
    )
    for name in ("tensorboard", "saved", "checkpoints"):
        assert any(path.startswith(name) for path in ours)
        assert [path for path in ours if path.startswith(name)] == [path for path in reference if path.startswith(name)]


# without a second process
def test_updates_have_as_many_episodes_of_each_batch_of_lanes():
    learner = work.make("ddpo-is")
    rng = np.random.default_rng(0)
    order = learner.shuffled(np.arange(16), rng)
    assert sorted(order) == list(range(16))
    assert [sorted(update // work.LANES) for update in order.reshape(4, 4)] == [[0, 1, 2, 3]] * 4
    assert order.tolist() != learner.shuffled(np.arange(16), rng).tolist()
    some = np.array([0, 1, 2, 3, 4, 13])
    order = learner.shuffled(some, rng)
    assert sorted(order) == some.tolist()
    assert sorted(order[:3] // work.LANES) == [0, 1, 3]


def test_processes_that_accelerate_does_not_see_are_named(monkeypatch):
    PartialState(cpu=True)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29501"}.items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(RuntimeError, match="WORLD_SIZE is 2, but accelerate sees 1 process"):
            Processes()
    finally:
        PartialState._reset_state()


def test_a_policy_on_another_process_s_device_is_named():
    processes = Processes()
    processes.device = torch.device("cuda", 1)
    with pytest.raises(ValueError, match="is to compute on cuda:1, but its policy is on cpu"):
        processes.join([torch.nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize("stale", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "0"}])
def test_a_stale_world_size_is_said_at_once(monkeypatch, stale):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in stale.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE=.* says that this process was launched with others.*unset"):
        Processes()


def test_an_empty_world_size_is_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    assert Processes().count == 1


def test_who_waits_for_others_says_so(monkeypatch):
    """All of a launcher's variables are there, and nobody comes."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29501"}.items():
        monkeypatch.setenv(name, value)
    said = threading.Event()
    monkeypatch.setattr("agents.updates.distributed._PATIENCE", 0.0)
    monkeypatch.setattr(logging.getLogger("agents.updates.distributed"), "warning", lambda *_: said.set())

    def never(**_):
        assert said.wait(timeout=60)
        raise TimeoutError

    monkeypatch.setattr("agents.updates.distributed.PartialState", never)
    with pytest.raises(TimeoutError):
        Processes()
