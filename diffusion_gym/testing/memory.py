"""What an environment has returned lately: nothing of it may change later, or share memory with what comes next."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .data import copied, is_array, on_host, overlap
from .report import fault

_REMEMBERED_STEPS = 3  # a buffer that is used in turn with others is found too


@dataclass(frozen=True)
class _Kept:
    """An array that was returned, and a copy of what was in it."""

    name: str
    step: int
    array: Any
    copy: np.ndarray
    may_be_shared: bool


class Memory:
    """The arrays of the last steps.

    Args:
        shared: The names of those that may share memory, to be read only.
    """

    def __init__(self, shared: frozenset[str] = frozenset()) -> None:
        self._shared = shared
        self._kept: deque[list[_Kept]] = deque(maxlen=_REMEMBERED_STEPS)

    def keep(self, arrays: Mapping[str, Any], info: Mapping[str, Any], *, step: int) -> None:
        """Remember what a step has returned, after a check that it shares no memory with what was returned before.

        Args:
            arrays: Observations, rewards and flags, by name.
            info: The info dict, of which an entry may stay the same object.
            step: The step.
        """
        returned = [_Kept(name, step, array, copied(array), name in self._shared) for name, array in arrays.items()]
        for new in returned:
            for old in (old for kept in self._kept for old in kept):
                if not (new.may_be_shared or old.may_be_shared) and overlap(new.array, old.array):
                    when = f"step {old.step}" if old.step else "the reset before"
                    what = f"shares memory with {old.name} of {when}: return a copy, not a buffer"
                    raise fault(what, step=step, key=new.name)
        returned += [_Kept(name, step, array, copied(array), True) for name, array in _arrays(info)]
        self._kept.append(returned)

    def check(self) -> None:
        """Check that nothing has changed since it was returned."""
        for kept in (kept for step in self._kept for kept in step):
            if not np.array_equal(on_host(kept.array), kept.copy, equal_nan=kept.copy.dtype.kind == "f"):
                raise fault("was changed by a later step: return a copy, not a buffer", step=kept.step, key=kept.name)


def _arrays(info: Mapping[str, Any], name: str = "info") -> Iterator[tuple[str, Any]]:
    """Yield the arrays of an info dict, and of the dicts and lanes within, by name."""
    for key, value in info.items():
        label = f"{name}[{key!r}]"
        if isinstance(value, Mapping):
            yield from _arrays(value, label)
        elif is_array(value) and on_host(value).dtype.kind != "O":
            yield label, value
        elif key == "final_obs" and isinstance(value, np.ndarray):
            for lane, row in enumerate(value):
                if isinstance(row, Mapping):
                    yield from _arrays(row, f"{label}[{lane}]")
                elif is_array(row):
                    yield f"{label}[{lane}]", row
