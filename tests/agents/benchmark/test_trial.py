"""Trials of seconds on the plane: their queries, curves, what is marked, and that an interrupted one goes on."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from agents import RLOO
from agents.benchmark import trial
from agents.benchmark.trial import CURVE_FILE, REWARDS_FILE, RUN_FILE, Budget, run_trial
from agents.runs.checkpoints import Checkpoints

OTHERS = "tests.agents.benchmark.entrants_of_others"


def curve_of(place):
    with (place / CURVE_FILE).open(newline="") as opened:
        return list(csv.DictReader(opened))


def without_clocks(place):
    return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in curve_of(place)]


@pytest.mark.parametrize("entrant", ["RLOO", f"{OTHERS}:OwnClass", f"{OTHERS}:own_loop"])
def test_a_trial_spends_its_budget_and_is_judged_on_the_way(small, tmp_path, entrant):
    place = run_trial("mixture", entrant, 0, tmp_path)
    run = json.loads((place / RUN_FILE).read_text())
    assert run["problems"] == []
    assert run["reward_queries"] == small.reward_queries
    assert [int(row["queries"]) for row in curve_of(place)] == [0, 32, 64, 96]
    assert float(curve_of(place)[0]["gain"]) == 0
    moved = [float(row["moved"]) for row in curve_of(place)]
    assert moved[0] < 1e-6
    assert 0 < moved[1] < moved[2] < moved[3]  # learnt from each rollout, the last one too
    assert (place / REWARDS_FILE).read_text().count("\n") == 1 + 4 * 9 * small.samples_per_prompt
    assert not (place / "checkpoints").exists()


def test_all_are_judged_from_the_same_images(small, tmp_path):
    first, other = (curve_of(run_trial("mixture", name, 1, tmp_path))[0] for name in ("RLOO", f"{OTHERS}:own_loop"))
    assert [first[key] for key in ("reward", "held_out", "diversity")] == [
        other[key] for key in ("reward", "held_out", "diversity")
    ]


def test_a_function_may_return_an_algorithm_or_a_policy(small, tmp_path):
    own = run_trial("mixture", f"{OTHERS}:own_algorithm", 0, tmp_path)
    assert [int(row["queries"]) for row in curve_of(own)] == [0, 48, 96]
    end = run_trial("mixture", f"{OTHERS}:only_at_the_end", 0, tmp_path)
    assert [row["queries"] for row in curve_of(end)] == ["0"]


def test_a_trial_that_asks_for_more_is_marked_whoever_asks(small, tmp_path):
    place = run_trial("mixture", f"{OTHERS}:greedy", 0, tmp_path)
    run = json.loads((place / RUN_FILE).read_text())
    assert run["problems"] == ["97 images were judged, and the task has 96"]


def test_another_model_s_weights_are_marked(small, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "digest_of", lambda model: "0" * 64)
    run = json.loads((run_trial("mixture", f"{OTHERS}:own_loop", 0, tmp_path) / RUN_FILE).read_text())
    assert run["problems"] == [
        f"the model's files have the digest {'0' * 12}, and the task's {small.model_sha256[:12]}"
    ]


@pytest.mark.parametrize(("entrant", "error"), [("no_policy", "got 'a policy'"), ("nothing", "no policy")])
def test_what_is_no_policy_is_refused(small, tmp_path, entrant, error):
    with pytest.raises((TypeError, ValueError), match=error):
        run_trial("mixture", f"{OTHERS}:{entrant}", 0, tmp_path)


def test_a_trial_that_was_stopped_ends_as_one_that_was_not(small, tmp_path, monkeypatch):
    expected = run_trial("mixture", "RLOO", 0, tmp_path / "whole")
    learn = RLOO.train

    def killed(self, rollout):
        if self.iteration == 2:
            raise KeyboardInterrupt
        return learn(self, rollout)

    monkeypatch.setattr(trial, "Checkpoints", lambda folder, **_: Checkpoints(folder, every=1, keep=1))
    monkeypatch.setattr(RLOO, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run_trial("mixture", "RLOO", 0, tmp_path / "stopped")
    monkeypatch.setattr(RLOO, "train", learn)
    place = run_trial("mixture", "RLOO", 0, tmp_path / "stopped")
    assert without_clocks(place) == without_clocks(expected)
    assert (place / REWARDS_FILE).read_text() == (expected / REWARDS_FILE).read_text()
    assert json.loads((place / RUN_FILE).read_text())["reward_queries"] == small.reward_queries


def test_a_finished_trial_is_not_run_again(small, tmp_path, monkeypatch):
    place = run_trial("mixture", "RLOO", 0, tmp_path)
    monkeypatch.setattr(trial, "Budget", None)
    assert run_trial("mixture", "RLOO", 0, tmp_path) == place


def test_a_budget_says_what_is_left(small):
    budget = Budget(small)
    budget.env.unwrapped.reward(torch.rand(5, 3, 1, 1), ["anything"] * 5)
    assert (budget.spent, budget.left) == (5, small.reward_queries - 5)


def test_the_loop_of_the_documentation_trains(small):
    text = (Path(__file__).parents[3] / "docs" / "benchmark.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace = {}
    exec(compile(code, "docs/benchmark.md", "exec"), namespace)
    budget = Budget(small)
    before = sample_of(budget.make_policy(budget.env, 0))
    *_, policy = namespace["reinforce"](budget.env, budget, 0)
    assert budget.left == 0
    assert not torch.equal(sample_of(policy), before)


def sample_of(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
