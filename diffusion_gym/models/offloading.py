"""Networks that stay in the CPU's memory and are lent to the device while they are used."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .base import outside_inference_mode


@contextlib.contextmanager
def lent(network: nn.Module, device: torch.device | None) -> Iterator[torch.device]:
    """A context in which a frozen network is on a device; its own memory stays, so nothing is copied back.

    Args:
        network: The network.
        device: The device; None: the one that the network is on.

    Yields:
        The device that the network is on.
    """
    here = next(network.parameters()).device
    if device is None or device == here:
        yield here
        return
    own = [dict(places) for places in _places(network)]
    try:
        with outside_inference_mode():
            moved = {id(tensor): _on(tensor, device) for places in own for tensor in places.values()}
        for places in _places(network):
            places.update({name: moved[id(tensor)] for name, tensor in places.items()})
        yield device
    finally:
        for places, tensors in zip(_places(network), own, strict=True):
            places.update(tensors)


def _places(network: nn.Module) -> list[dict[str, Any]]:
    """Return the dictionaries in which a network's modules hold their weights."""
    return [places for module in network.modules() for places in (module._parameters, module._buffers)]


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.data.to(device), requires_grad=False)
    return None if tensor is None else tensor.to(device)
