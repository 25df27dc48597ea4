"""The score of trials whose curves are written by hand."""

import csv
import json

import numpy as np
import pytest
from scipy import stats

from agents.benchmark.score import Trial, interquartile_mean, interval_of, profile, read_trials
from agents.benchmark.trial import CURVE_FILE, RUN_FILE

COLUMNS = ("queries", "cpu_seconds", "peak_memory_mib", "reward", "gain", "held_out_change", "held_out_low")


def write_trial(folder, *, algorithm="A", seed=0, rows, tolerance=0.02, whole=None, problems=(), task="emoji"):
    folder.mkdir(parents=True)
    described = {"name": task, "tolerance": tolerance, "whole": whole, "reward": "r", "held_out": "h"}
    described |= {"model": "emoji", "env_id": "DenoisingMDP-v0", "reward_queries": 640, "samples_per_prompt": 2}
    run = {"task": described, "algorithm": algorithm, "seed": seed, "problems": list(problems), "protocol": 1}
    run |= {"unit": "kB", "versions": {"torch": "2"}, "python": "3.11", "machine": "x86_64"}
    (folder / RUN_FILE).write_text(json.dumps(run))
    extra = {"kl": 1.0, "diversity": 0.5, "moved": 0.1, "held_out": 0.4}
    with (folder / CURVE_FILE).open("w", newline="") as opened:
        writer = csv.DictWriter(opened, [*COLUMNS, *extra])
        writer.writeheader()
        writer.writerows(dict(zip(COLUMNS, row, strict=True)) | extra for row in rows)
    return folder


ROWS = [
    (0, 0, 100, 2.0, 0.0, 0.0, 0.0),
    (160, 10, 100, 2.1, 0.1, 0.0, -0.01),
    (320, 20, 100, 2.3, 0.3, -0.005, -0.019),
    (480, 30, 100, 2.6, 0.6, -0.03, -0.05),
    (640, 40, 100, 2.8, 0.8, -0.001, -0.01),
]


def test_what_is_gained_after_the_held_out_reward_fell_does_not_count(tmp_path):
    trial = Trial.read(write_trial(tmp_path / "a", rows=ROWS))
    assert trial.is_held.tolist() == [True, True, True, False, False]
    assert trial.score == pytest.approx(15.0)
    assert trial.queries == 320
    assert trial.unconstrained == pytest.approx(40.0)


def test_a_training_that_only_loses_scores_zero(tmp_path):
    rows = [ROWS[0], (160, 10, 100, 1.9, -0.1, 0.0, 0.0), (320, 20, 100, 2.5, 0.5, -0.1, -0.2)]
    trial = Trial.read(write_trial(tmp_path / "a", rows=rows))
    assert (trial.score, trial.queries) == (0.0, 0)


def test_a_negative_reward_s_gain_is_positive_and_a_task_may_say_its_whole(tmp_path):
    rows = [(0, 0, 1, -2.0, 0.0, 0.0, 0.0), (160, 1, 1, -1.0, 1.0, 0.0, 0.0)]
    assert Trial.read(write_trial(tmp_path / "a", rows=rows)).score == pytest.approx(50.0)
    assert Trial.read(write_trial(tmp_path / "b", rows=rows, whole=4.0)).score == pytest.approx(25.0)


def test_trials_of_several_machines_are_merged_and_none_is_counted_twice(tmp_path):
    for machine, seeds in (("one", (0, 1)), ("other", (1, 2))):
        for seed in seeds:
            write_trial(tmp_path / machine / f"seed_{seed}", seed=seed, rows=ROWS)
    (tmp_path / "one" / "unfinished").mkdir()
    trials = read_trials([tmp_path / "one", tmp_path / "other"])
    assert [(trial.folder.parent.name, trial.run["seed"]) for trial in trials] == [("one", 0), ("one", 1), ("other", 2)]


def test_the_interquartile_mean_leaves_the_extremes_out():
    assert interquartile_mean(np.array([1.0, 2.0, 3.0, 4.0, 100.0])) == 3.0
    interval = interval_of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert interval.low < interval.mean == 3.0 < interval.high
    assert interval_of([7.0]) == (7.0, 7.0, 7.0)
    assert interval_of([7.0, 7.0]) == (7.0, 7.0, 7.0)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(60, 10))
    held = np.mean([low <= 0 <= high for _, low, high in map(interval_of, draws)])
    assert 0.75 < held < 1  # a percentile bootstrap of ten is a little too narrow
    assert stats.trim_mean(draws[0], 0.25) == interquartile_mean(draws[0])


def test_the_profile_is_a_share():
    assert profile([1.0, 3.0], np.array([0.0, 2.0, 3.0])).tolist() == [1.0, 0.5, 0.0]
