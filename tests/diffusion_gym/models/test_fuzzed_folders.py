import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from tests.diffusion_gym.models.fuzzed_folders import STABLE_DIFFUSION, judge, outcomes


@pytest.fixture(autouse=True)
def _quiet():
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity(50)
    transformers_logging.set_verbosity(50)
    yield
    diffusers_logging.set_verbosity(levels[0])
    transformers_logging.set_verbosity(levels[1])


def test_fuzzed_folders_equal_the_pipeline_or_are_warned_about_or_refused_by_name():
    found = [(seed, outcome) for seed, outcome in outcomes(range(60))]
    assert [(seed, outcome) for seed, outcome in found if outcome.is_fault] == []
    assert {outcome.kind for _, outcome in found} == {"equal", "warned", "refused"}


@pytest.mark.parametrize("family", STABLE_DIFFUSION, ids=lambda family: family.name)
def test_folders_as_diffusers_writes_them_equal_the_pipeline(tmp_path, family):
    outcome = judge(family.write(tmp_path / "model"), "nothing", family)
    assert outcome.kind == "equal", outcome
