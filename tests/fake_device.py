"""A fake accelerator: nothing is computed, and what mixes it with the host or reads a value from it raises.

Under `FakeTensorMode` the device "lazy" is one other than the CPU. The one function that may wait,
`transfer.to_host`, is replaced by one that makes values up and notes what it was asked for.
"""

import traceback

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_gym import transfer

DEVICE = "lazy"


def move(module):
    """Put a module's weights on the fake device (`module.to` cannot)."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                part._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)


def on_the_host(monkeypatch, owner, name):
    """Let a method that works on host values alone compute really, not in the fake mode."""
    method = getattr(owner, name)

    def real(*args, **kwargs):
        with unset_fake_temporarily():
            return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, real)


class Waits:
    """Stands in for `transfer.to_host`: flags come back True, numbers as `number`; `shapes` has what was asked for."""

    def __init__(self, monkeypatch):
        self.number = 0.5
        self.shapes = []
        self._real = transfer.to_host
        monkeypatch.setattr(transfer, "to_host", self.to_host)

    def to_host(self, tensor):
        if tensor.device.type == "cpu":
            return self._real(tensor)
        assert tensor.device.type == DEVICE
        self.shapes.append(tuple(tensor.shape))
        is_flag = tensor.dtype == torch.bool
        return np.full(tuple(tensor.shape), True if is_flag else self.number)


class BlockingCopies(TorchDispatchMode):
    """Notes the copies from the host to the device that wait until all work queued there is done."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            source, target, waits = args[0], result, not kwargs.get("non_blocking", False)
        elif func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            return result
        if waits and source.device.type == "cpu" and target.device.type == DEVICE:
            self.found.append("".join(traceback.format_stack()[-40:]))
        return result
