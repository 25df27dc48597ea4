"""A task of seconds in the place of the one on the plane, and its trials."""

from dataclasses import replace

import pytest

from agents import Rollouts
from agents.benchmark import tasks
from agents.benchmark.tasks import TASKS


@pytest.fixture
def small(monkeypatch):
    """Return the task on the plane with 96 reward queries, under its own name."""
    task = TASKS["mixture"]
    task = replace(
        task,
        reward_queries=96,
        eval_every=32,
        num_envs=16,
        samples_per_prompt=2,
        env={"num_steps": 3},
        settings={**task.settings, "rollouts": Rollouts(samples=32, group_size=8)},
    )
    monkeypatch.setattr(tasks, "TASKS", {**TASKS, task.name: task})
    return task
