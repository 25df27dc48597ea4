"""What a function of tensors must leave alone: its arguments, its earlier results, and the global generators."""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import is_array, on_host, overlap
from .report import fault


def tensors_of(value: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors in a value, by name: of dicts, sequences and dataclasses too."""
    if isinstance(value, Tensor):
        return {name: value}
    if is_dataclass(value):
        items: Any = ((field.name, getattr(value, field.name)) for field in fields(value))
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        items = enumerate(value)
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, item in items:
        found |= tensors_of(item, f"{name}.{key}" if name else str(key))
    return found


def called(name: str, function: Callable[..., Any], **arguments: Any) -> Any:
    """Return what a function returns, after a check that its arguments are as before and share no memory with it.

    Raises:
        AssertionError: an argument was changed, or is returned.
    """
    before = copy.deepcopy(arguments)
    result = function(**arguments)
    for argument, value in arguments.items():
        if not _same(value, before[argument]):
            raise fault("must not change its argument", key=f"{name}({argument}=…)")
        for place, given in tensors_of(value, argument).items():
            for part, tensor in tensors_of(result, "what it returns").items():
                if overlap(given, tensor):
                    raise fault(f"{part} shares memory with {place}: return a copy", key=name)
    return result


def _same(value: Any, other: Any) -> bool:
    if is_array(value):
        return bool(np.array_equal(on_host(value), on_host(other), equal_nan=True))
    if isinstance(value, Mapping):
        return value.keys() == other.keys() and all(_same(value[key], other[key]) for key in value)
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(map(_same, value, other))
    return bool(value is other or value == other or not isinstance(value, str | int | float))


def generator_states() -> tuple[object, ...]:
    """Return the states of the global generators of torch, NumPy and Python, to be compared."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), str(numpy_state), random.getstate()


def moved_generators() -> tuple[object, ...]:
    """Return the states of the global generators once each has drawn: a function that seeds them is seen too."""
    torch.rand(1), np.random.random(), random.random()  # noqa: NPY002
    return generator_states()


def unlike_tensors(got: Tensor, expected: Tensor, tolerance: float) -> str:
    """Return how two tensors differ; empty where they agree within tolerance·(1 + the largest number)."""
    if got.shape != expected.shape:
        return f"got shape {list(got.shape)}, expected {list(expected.shape)}"
    if not got.numel():
        return ""
    got, expected = got.detach().double(), expected.detach().double()
    difference = float(on_host((got - expected).abs().max()))
    largest = float(on_host(expected.abs().max()))
    return "" if difference <= tolerance * (1 + largest) else f"they differ by {difference:.3g}, of {largest:.3g}"
