"""The target's decay."""

import pytest

from agents.consistency import Averaged, GrowingAverage, Itself


def test_the_published_decay():
    """μ(k) = exp(s_0·ln μ_0/N(k)), at N(0) = s_0 it is μ_0."""
    assert GrowingAverage(0.95, 2).decay(2) == pytest.approx(0.95)
    assert GrowingAverage(0.9, 2).decay(151) == pytest.approx(0.9 ** (2 / 151))
    with pytest.raises(ValueError, match="needs a number of levels"):
        GrowingAverage().decay(None)


def test_constant_ones():
    assert Averaged(0.99).decay(None) == 0.99
    assert Itself().decay(3) == 0.0
    with pytest.raises(ValueError, match="mu must be"):
        Averaged(1.0)
