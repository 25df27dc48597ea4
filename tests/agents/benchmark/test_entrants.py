"""Who takes part: names, classes, functions, and what is said of others."""

import pytest

from agents import GRPO
from agents.benchmark.entrants import ENTRANTS, find_entrant
from agents.benchmark.trial import Budget
from tests.agents.benchmark.entrants_of_others import OwnClass, own_loop

OTHERS = "tests.agents.benchmark.entrants_of_others"


@pytest.mark.parametrize("name", ENTRANTS)
def test_ours_are_made_with_the_task_s_settings_and_their_own(name, small):
    budget = Budget(small)
    kind, own = ENTRANTS[name]
    algorithm = find_entrant(name)(budget.env, budget, 3)
    assert type(algorithm) is kind
    assert algorithm.run_seed == 3
    assert algorithm.rollouts == small.settings["rollouts"]
    for key, value in own.items():
        assert getattr(algorithm, key) == value


def test_the_published_clip_range_is_scaled_to_the_latents(small):
    budget = Budget(small)
    algorithm = find_entrant("GRPO")(budget.env, budget, 0)
    assert isinstance(algorithm, GRPO)
    assert algorithm.clip_range == pytest.approx(1e-4 * 16_384 / 2)


def test_anyone_s_class_is_made_with_the_task_s_settings(small):
    budget = Budget(small)
    algorithm = find_entrant(f"{OTHERS}:OwnClass")(budget.env, budget, 0)
    assert type(algorithm) is OwnClass
    assert algorithm.rollouts == small.settings["rollouts"]


def test_anyone_s_function_is_called_as_it_is():
    assert find_entrant(f"{OTHERS}:own_loop") is own_loop


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("RLO", ValueError, r"Did you mean 'RLOO'.*package\.module:Class"),
        (f"{OTHERS}:Nobody", ValueError, "no class or function 'Nobody'"),
        ("tests.agents.nowhere:Class", ModuleNotFoundError, "nowhere"),
    ],
)
def test_who_is_not_there_is_said(name, error, text):
    with pytest.raises(error, match=text):
        find_entrant(name)
