"""The gradients that an algorithm applies, and how near to each other two computations of one gradient are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agents import Algorithm


def applied_gradients(algorithm: Algorithm) -> list[list[Tensor]]:
    """Return a list that fills with the gradients of each update to come, one of each trained parameter.

    They are seen as the optimizer sees them: after clipping, so give `AdamW(max_grad_norm=None)` for the raw ones.
    """
    applied: list[list[Tensor]] = []
    parameters = [parameter for parameter in algorithm.policy.parameters() if parameter.requires_grad]
    algorithm.updates.optimizer.register_step_pre_hook(
        lambda *_: applied.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
    )
    return applied


def assert_gradients_close(found: Sequence[Tensor], expected: Sequence[Tensor], *, share: float = 3e-3) -> None:
    """Each entry differs by at most this share of its own size and of the largest entry.

    An entry that is a small sum of large terms carries their rounding errors: no bound in its own size alone holds on
    every processor, and none in absolute numbers.
    """
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert largest > 0
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=share, atol=share * largest)
