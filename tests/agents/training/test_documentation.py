import dataclasses
import inspect

import pytest

from agents import DDPOIS, DDPOSF, DPOK, GRPO, RLOO, RWR, DiffusionNFT
from agents.training.documentation import documented_arguments, with_inherited_arguments

BASE = """Base.

    Args:
        policy: What is trained.
        rate: The rate,
            in two lines.

    Raises:
        ValueError: no.
    """


@pytest.mark.parametrize("algorithm", [DDPOIS, DDPOSF, RLOO, GRPO, DPOK, RWR, DiffusionNFT])
def test_help_says_of_every_keyword_what_it_means(algorithm):
    assert list(documented_arguments(inspect.getdoc(algorithm) + "\n")) == [
        field.name for field in dataclasses.fields(algorithm)
    ]


def test_own_words_take_the_place_of_inherited_ones():
    merged = with_inherited_arguments("Derived.\n\n    Args:\n        rate: Another.\n        clip: New.\n    ", BASE)
    assert documented_arguments(merged) == {
        "policy": "    policy: What is trained.\n",
        "rate": "    rate: Another.\n",
        "clip": "    clip: New.\n",
    }


def test_a_docstring_without_arguments_gets_the_inherited_ones():
    merged = with_inherited_arguments("Derived.", BASE)
    assert merged.startswith(
        "Derived.\n\nArgs:\n    policy: What is trained.\n    rate: The rate,\n        in two lines."
    )
    assert "Raises" not in merged
