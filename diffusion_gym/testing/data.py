"""The data of vector environments, NumPy's or torch's: by leaf of the space, by lane, and on the host."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple
from gymnasium.utils.env_checker import data_equivalence
from torch import Tensor

from .. import transfer
from .report import fault

Row = dict[str, Any]
"""One lane's observation on the host: an array, or what its space says, by the name of the leaf."""

_WITH_ARRAYS = (Box, Discrete, MultiBinary, MultiDiscrete)
_IS_OF_KIND = {
    "f": Tensor.is_floating_point,
    "i": lambda tensor: not tensor.is_floating_point() and tensor.dtype not in (torch.bool, torch.uint8),
    "u": lambda tensor: tensor.dtype == torch.uint8,
    "b": lambda tensor: tensor.dtype == torch.bool,
}


def leaves(space: Space, value: Any, name: str = "observation") -> Iterator[tuple[str, Space, Any]]:
    """Yield the name, space and value of each leaf of a structure: the keys of a `Dict`, the places of a `Tuple`.

    Raises:
        AssertionError: the value has not the space's keys or length.
    """
    if isinstance(space, Dict):
        if not isinstance(value, Mapping) or set(value) != set(space):
            keys = sorted(value) if isinstance(value, Mapping) else type(value).__name__
            raise fault(f"keys {keys} came, the space has {sorted(space)}", key=name)
        for key in space:
            yield from leaves(space[key], value[key], f"{name}[{key!r}]")
    elif isinstance(space, Tuple):
        if not isinstance(value, tuple | list) or len(value) != len(space):
            raise fault(f"must be a tuple of {len(space)}, got {type(value).__name__}", key=name)
        for place, (part, item) in enumerate(zip(space, value, strict=True)):
            yield from leaves(part, item, f"{name}[{place}]")
    else:
        yield name, space, value


def is_array(value: object) -> bool:
    """Return whether a value is a NumPy array or a torch tensor."""
    return isinstance(value, np.ndarray | Tensor)


def on_host(value: Any) -> Any:
    """Return an array or tensor as a NumPy array, other values as they are."""
    return transfer.to_host(value) if isinstance(value, Tensor) else value


def copied(value: Any) -> Any:
    """Return a copy of an array, tensor or NumPy number on the host; other values as they are."""
    return np.array(on_host(value)) if is_array(value) or isinstance(value, np.generic) else value


def check_batch(space: Space, value: Any, num_envs: int, *, step: int, name: str = "observation") -> None:
    """Check that a batch of observations is of its space: structure, shapes, dtypes, bounds, one device, no gradient.

    Args:
        space: The space of one lane.
        value: The batch.
        num_envs: The number of lanes.
        step: The step at which it came, for the error.
        name: What it is, for the error.
    """
    devices = set()
    for leaf, leaf_space, batch in leaves(space, value, name):
        if isinstance(leaf_space, _WITH_ARRAYS):
            _check_array(leaf_space, batch, (num_envs, *(leaf_space.shape or ())), step=step, name=leaf)
            devices.add(str(batch.device) if isinstance(batch, Tensor) else "numpy")
        elif not isinstance(batch, Sequence | np.ndarray) or len(batch) != num_envs:
            raise fault(f"must hold one value for each of {num_envs} lanes, got {batch!r:.80}", step=step, key=leaf)
        host = on_host(batch)
        for lane in range(num_envs):
            check_contains(leaf_space, host[lane], step=step, lane=lane, name=leaf)
    if len(devices) > 1:
        raise fault(f"all leaves must be on one device, got {sorted(devices)}", step=step, key=name)


def _check_array(space: Space, batch: Any, shape: tuple[int, ...], *, step: int, name: str) -> None:
    if not is_array(batch):
        raise fault(f"must be a numpy array or a torch tensor, got {type(batch).__name__}", step=step, key=name)
    if tuple(batch.shape) != shape:
        raise fault(f"has shape {tuple(batch.shape)}, the space says {shape}", step=step, key=name)
    dtype = np.dtype(space.dtype)
    if isinstance(batch, Tensor):
        if not _IS_OF_KIND[dtype.kind](batch):
            raise fault(f"is {batch.dtype}, the space says {dtype}", step=step, key=name)
        if batch.requires_grad:
            raise fault("carries a gradient: return it detached", step=step, key=name)
    elif batch.dtype != dtype:
        raise fault(f"is {batch.dtype}, the space says {dtype}", step=step, key=name)


def check_contains(space: Space, value: Any, *, step: int, lane: int, name: str) -> None:
    """Check that one lane's leaf lies in its space; a tensor's number may be of another precision."""
    if isinstance(value, np.ndarray | np.generic) and space.dtype is not None and value.dtype != space.dtype:
        value = value.astype(space.dtype)
    if not space.contains(value):
        raise fault(f"{value!r:.120} is outside {space!r:.120}", step=step, lane=lane, key=name)


def row_of(space: Space, value: Any, lane: int) -> Row:
    """Return one lane of a batch of observations, copied to the host."""
    return {name: copied(batch[lane]) for name, _, batch in leaves(space, value)}


def row_of_one(space: Space, value: Any) -> Row:
    """Return one environment's observation as a row."""
    return {name: np.array(leaf) if isinstance(s, _WITH_ARRAYS) else leaf for name, s, leaf in leaves(space, value)}


def is_continuous(space: Space) -> bool:
    """Return whether a space has a leaf of floating-point numbers, which hardly ever agree by chance."""
    parts = space.spaces.values() if isinstance(space, Dict) else space.spaces if isinstance(space, Tuple) else ()
    return any(map(is_continuous, parts)) or (isinstance(space, Box) and np.issubdtype(space.dtype, np.floating))


def difference(got: Row, expected: Row, *, tolerance: float = 0.0) -> tuple[str, str] | None:
    """Return the leaf in which two rows differ, and how; None where they are equal.

    Args:
        got: A row.
        expected: Another.
        tolerance: The relative and absolute difference that numbers may have.
    """
    for name, value in expected.items():
        other = got[name]
        if not is_array(value):
            if not data_equivalence(value, other):
                return name, f"got {other!r:.80}, expected {value!r:.80}"
            continue
        if value.shape != np.shape(other):
            return name, f"got shape {np.shape(other)}, expected {value.shape}"
        equal = np.isclose(other, value, rtol=tolerance, atol=tolerance, equal_nan=True)
        if not equal.all():
            place = tuple(int(index) for index in np.argwhere(~equal)[0])
            at = f" at {list(place)}" if place else ""
            return name, f"got {np.asarray(other)[place]!s}, expected {value[place]!s}{at}"
    return None


def is_equal(row: Row, other: Row) -> bool:
    """Return whether two rows are equal to the last bit."""
    return difference(row, other) is None


def overlap(value: Any, other: Any) -> bool:
    """Return whether two arrays or tensors may share memory."""
    spans = [_span(array) for array in (value, other)]
    if None in spans:
        return False
    (device, low, high), (other_device, other_low, other_high) = spans  # type: ignore[misc]
    return device == other_device and low < other_high and other_low < high


def _span(array: Any) -> tuple[str, int, int] | None:
    """Return the device, and the first and last address, of an array's memory; None where it has none."""
    if isinstance(array, Tensor):
        device, start, size = str(array.device), array.data_ptr(), array.element_size()
        strides = [stride * size for stride in array.stride()]
    else:
        device, start, size, strides = "cpu", array.ctypes.data, array.itemsize, array.strides
    if 0 in array.shape:
        return None
    reach = [(length - 1) * stride for length, stride in zip(array.shape, strides, strict=True)]
    return device, start + sum(min(0, far) for far in reach), start + sum(max(0, far) for far in reach) + size
