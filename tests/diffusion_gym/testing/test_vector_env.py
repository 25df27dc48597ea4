"""`check_vector_env` lets Gymnasium's environments pass, and refuses those that break the contract, each in one way."""

import re

import pytest

from diffusion_gym.testing import check_vector_env
from tests.diffusion_gym.testing.walk import Walk
from tests.diffusion_gym.testing.zoo import ALL, ZOO

CASES = [(entry, mode) for entry in ZOO for mode in entry.modes]


@pytest.mark.parametrize(("entry", "mode"), CASES, ids=lambda part: part.env.__name__ if part in ZOO else part.name)
def test_broken_environments_are_refused(entry, mode):
    def check():
        return check_vector_env(entry.env(mode), max_steps=20, twin=lambda: entry.env(mode))

    if entry.is_weakness:
        report = check()
        found = report.weaknesses | report.unchecked
        assert any(re.search(entry.message, f"{name}: {what}") for name, what in found.items()), str(report)
        assert not found.keys() & set(report.holds)
    else:
        with pytest.raises(AssertionError, match=entry.message):
            check()


def test_the_zoo_has_faults_of_every_mode():
    for mode in ALL:
        assert len({entry.env for entry in ZOO if mode in entry.modes}) >= 40
    assert len({entry.env for entry in ZOO}) >= 50


@pytest.mark.parametrize("mode", ALL)
def test_an_environment_that_keeps_the_contract_passes(mode):
    report = check_vector_env(Walk(mode))
    assert report.weaknesses == {}
    assert report.unchecked == {
        "the single environment does the same, final observation and info too": "it has no spec"
    }
