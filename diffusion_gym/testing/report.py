"""What a check has found: a report of what holds, what need not hold and does not, and what could not be checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


def fault(message: str, *, step: int | None = None, lane: int | None = None, key: str | None = None) -> AssertionError:
    """Return the error that says where a contract is broken, and how.

    Args:
        message: What came, and what was expected.
        step: The call of `step` since the reset, from 1; 0 is the reset.
        lane: The lane.
        key: The name of the value.
    """
    places = ("" if step is None else f"step {step}" if step else "reset", "" if lane is None else f"lane {lane}", key)
    where = ", ".join(place for place in places if place)
    return AssertionError(f"{where}: {message}" if where else message)


@dataclass(frozen=True)
class Report:
    """What has been checked of a thing, and what has not. What is wrong is an error, never a line in here.

    Args:
        subject: The thing.
        holds: What has been checked, and holds.
        weaknesses: What the contract leaves open and the thing does not do, with what it does; by name.
        unchecked: What could not be checked, with the reason; by name.
    """

    subject: str
    holds: tuple[str, ...]
    weaknesses: dict[str, str] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.subject, *(f"  holds      {name}" for name in self.holds)]
        lines += [f"  weakness   {name}: {what}" for name, what in self.weaknesses.items()]
        lines += [f"  unchecked  {name}: {why}" for name, why in self.unchecked.items()]
        return "\n".join(lines)


class Findings:
    """The findings of a check that is under way.

    Args:
        subject: The thing that is checked.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._holds: list[str] = []
        self._weaknesses: dict[str, str] = {}
        self._unchecked: dict[str, str] = {}

    @contextmanager
    def checking(self, name: str) -> Iterator[None]:
        """The context in which one thing is checked: it holds, unless there is an error or a word against it."""
        yield
        if name not in self._weaknesses and name not in self._unchecked:
            self._holds.append(name)

    def weakness(self, name: str, what: str) -> None:
        """Note that what the contract leaves open does not hold."""
        self._weaknesses[name] = what

    def cannot(self, name: str, why: str) -> None:
        """Note that something cannot be checked."""
        self._unchecked[name] = why

    def report(self, *, strict: bool = False) -> Report:
        """Return the report.

        Args:
            strict: Weaknesses, and what could not be checked, are errors.

        Raises:
            AssertionError: there are some, and the check is strict.
        """
        report = Report(self._subject, tuple(self._holds), dict(self._weaknesses), dict(self._unchecked))
        if strict and (report.weaknesses or report.unchecked):
            raise AssertionError(f"strict, but\n{report}")
        return report
