"""How near to each other two computations of one gradient are."""

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_gradients_close(found: Sequence[Tensor], expected: Sequence[Tensor], *, share: float = 3e-3) -> None:
    """Each entry differs by at most this share of its own size and of the largest entry.

    An entry that is a small sum of large terms carries their rounding errors: no bound in its own size alone holds on
    every processor, and none in absolute numbers.
    """
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert largest > 0
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=share, atol=share * largest)
