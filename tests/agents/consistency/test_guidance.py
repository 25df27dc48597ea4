"""Guidance scales."""

import pytest
import torch

from agents.consistency import DrawnGuidance, FixedGuidance


def test_scales():
    generator = torch.Generator().manual_seed(0)
    assert FixedGuidance(4.0).scale(generator) == 4.0
    drawn = [DrawnGuidance(2.0, 5.0).scale(generator) for _ in range(200)]
    assert 2 <= min(drawn) < 2.2
    assert 4.8 < max(drawn) <= 5


@pytest.mark.parametrize(
    "make", [lambda: FixedGuidance(-1.0), lambda: DrawnGuidance(5.0, 5.0), lambda: DrawnGuidance(0.5, 2)]
)
def test_impossible_ones_are_refused(make):
    with pytest.raises(ValueError, match=r"guidance_scale must|low must"):
        make()
