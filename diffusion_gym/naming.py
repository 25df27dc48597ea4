"""Error messages for unknown names."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, allowed: Iterable[str]) -> str:
    """Return " Did you mean …?" with the allowed name that is most like this one; empty where none is like it."""
    closest = difflib.get_close_matches(str(name), sorted(allowed), n=1)
    return f" Did you mean {closest[0]!r}?" if closest else ""


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> str:
    """Return "unknown <kind> <name>: allowed are … Did you mean …?", the message of every such error."""
    return f"unknown {kind} {_with_allowed(name, allowed)}"


def unexpected_argument(function: str, name: str, allowed: Iterable[str]) -> str:
    """Return the message for an unknown argument, in Python's own words, which some libraries look for."""
    return f"{function}() got an unexpected keyword argument {_with_allowed(name, allowed)}"


def _with_allowed(name: object, allowed: Iterable[str]) -> str:
    names = sorted(allowed)
    return f"{name!r}: allowed are {', '.join(map(repr, names))}." + did_you_mean(name, names)
