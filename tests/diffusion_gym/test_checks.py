import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from diffusion_gym.checks import checked_integer, checked_number


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_of_every_kind_are_taken(value):
    checked = checked_integer("size", value, at_least=3)
    assert type(checked) is int
    assert checked == 3


@pytest.mark.parametrize("value", [True, np.bool_(True), 3.0, np.float32(3), "3", None, np.array([3]), 2])
def test_what_is_no_integer_or_too_small_is_named(value):
    with pytest.raises(ValueError, match=r"size must be an integer of at least 3, got "):
        checked_integer("size", value, at_least=3)


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.int64(1), Fraction(1, 2)])
def test_numbers_of_every_kind_are_taken(value):
    checked = checked_number("gamma", value, "(0, 1]")
    assert type(checked) is float
    assert checked == value


@pytest.mark.parametrize(
    "value", [0, 1.5, -1, float("nan"), float("inf"), np.float32("nan"), True, "0.5", None, 1j, torch.ones(())]
)
def test_what_is_no_finite_number_in_the_range_is_named(value):
    with pytest.raises(ValueError, match=r"gamma must be a finite number in \(0, 1\], got "):
        checked_number("gamma", value, "(0, 1]")


@pytest.mark.parametrize(("value", "within"), [(-1, "[0, inf)"), (2, "[0, 2)"), (float("inf"), "(-inf, inf)")])
def test_the_interval_is_said_and_its_ends_are_kept_to(value, within):
    with pytest.raises(ValueError, match=re.escape(f"weight must be a finite number in {within}, got {value}")):
        checked_number("weight", value, within)
    assert checked_number("weight", 0, "[0, 2)") == 0
