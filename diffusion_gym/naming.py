"""Error messages for names that are not known."""

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> str:
    """Return "unknown <kind> <name>: allowed are … Did you mean …?", the message of every such error."""
    return f"unknown {kind} {_with_allowed(name, allowed)}"


def unexpected_argument(function: str, name: str, allowed: Iterable[str]) -> str:
    """Return the same for an argument, in Python's own words, which some libraries look for."""
    return f"{function}() got an unexpected keyword argument {_with_allowed(name, allowed)}"


def _with_allowed(name: object, allowed: Iterable[str]) -> str:
    names = sorted(allowed)
    message = f"{name!r}: allowed are {', '.join(repr(n) for n in names)}."
    closest = difflib.get_close_matches(str(name), names, n=1)
    return f"{message} Did you mean {closest[0]!r}?" if closest else message
