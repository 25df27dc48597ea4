"""Error messages for names that are not known."""

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> str:
    """Return "unknown <kind> <name>: allowed are … Did you mean …?", the message of every such error."""
    names = sorted(allowed)
    message = f"unknown {kind} {name!r}: allowed are {', '.join(repr(n) for n in names)}."
    closest = difflib.get_close_matches(str(name), names, n=1)
    return f"{message} Did you mean {closest[0]!r}?" if closest else message
