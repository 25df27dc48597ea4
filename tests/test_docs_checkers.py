"""The blocks of docs/checkers_and_wrappers.md run as they stand, and its report is what the check says."""

import re
from pathlib import Path

import gymnasium as gym
import pytest

from diffusion_gym.testing import check_vector_env
from tests.diffusion_gym.testing import test_model, test_reward, test_torch_contract, zoo

TEXT = (Path(__file__).parents[1] / "docs" / "checkers_and_wrappers.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs(index):
    exec(compile(BLOCKS[index], f"checkers_and_wrappers.md block {index}", "exec"), {"__name__": "__main__"})


def test_the_report_is_what_the_check_says():
    (report,) = re.findall(r"```\n(CartPole.*?)\n```", TEXT, re.DOTALL)
    numbers = re.compile(r"-?\d+\.\d+(e-\d+)?|step \d+")
    got = str(check_vector_env(gym.make_vec("CartPole-v1", 3)))
    assert numbers.sub("", got) == numbers.sub("", report)


def test_the_numbers_of_broken_things_are_counted():
    kinds = {entry.env for entry in zoo.ZOO}
    cases = sum(len(entry.modes) for entry in zoo.ZOO)
    weak = len({entry.env for entry in zoo.ZOO if entry.is_weakness})
    assert f"{len(kinds)} NumPy environments" in TEXT
    assert f"({cases} cases; {weak} of the {len(kinds)}\n  are weaknesses)" in TEXT
    assert f"and {len(test_torch_contract.BROKEN)} torch ones ({len(test_torch_contract.CASES)} cases)" in TEXT
    assert f"{len(test_model.BROKEN)} broken models and {len(test_reward.BROKEN)} broken rewards" in TEXT
