"""Trials as processes: each with one thread, none stopped by another, none run twice, killed ones gone on with."""

import os
import signal
import subprocess
import sys
import time

import pytest

from agents.benchmark import runner
from agents.benchmark.command import main
from agents.benchmark.runner import LOG_FILE, Order, run_all
from agents.benchmark.trial import RUN_FILE, trial_folder

OTHERS = "tests.agents.benchmark.entrants_of_others"


def test_what_fails_is_said_and_stops_no_other(tmp_path):
    orders = [Order("mixture", f"{OTHERS}:broken", 0), Order("mixture", f"{OTHERS}:only_at_the_end", 0)]
    (failure,) = run_all(orders, tmp_path, processes=2)
    assert "broken, seed 0: exit status 1, RuntimeError: this algorithm has a bug" in failure
    assert "Traceback" in (orders[0].place(tmp_path) / LOG_FILE).read_text()
    assert (orders[1].place(tmp_path) / RUN_FILE).exists()


def test_only_what_is_not_finished_is_run(tmp_path, monkeypatch):
    done, todo = Order("mixture", "RLOO", 0), Order("mixture", "RLOO", 1)
    done.place(tmp_path).mkdir(parents=True)
    (done.place(tmp_path) / RUN_FILE).write_text("{}")
    asked = []
    monkeypatch.setattr(runner, "attempt", lambda order, folder: asked.append(order))
    assert run_all([done, todo], tmp_path) == []
    assert asked == [todo]


def test_a_trial_that_is_killed_is_gone_on_with(tmp_path):
    place = trial_folder(tmp_path, "mixture", "RLOO", 0)
    command = [sys.executable, "-m", "agents.benchmark", "trial", "mixture", "RLOO", "0", "--output", str(tmp_path)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    deadline = time.monotonic() + 600
    while not any((place / "checkpoints").glob("iteration_*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (place / RUN_FILE).exists()
    assert run_all([Order("mixture", "RLOO", 0)], tmp_path) == []
    assert (place / RUN_FILE).exists()


def test_the_command_refuses_what_does_not_exist_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'RLOO'"):
        main(["run", "--task", "mixture", "--algorithm", "RLO", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="no finished trial"):
        main(["compare", str(tmp_path)])
    assert not any(tmp_path.iterdir())
