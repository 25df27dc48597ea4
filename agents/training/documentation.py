"""Docstrings of classes whose keywords are inherited: `help` says of every keyword what it means."""

import inspect
import re

_ARGUMENTS = re.compile(r"^Args:\n((?:    .*\n|\n(?=    ))*)", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+): (?:.*\n(?:        .*\n)*)", re.MULTILINE)


def documented_arguments(docstring: str) -> dict[str, str]:
    """Return the entries of a docstring's `Args:` section by the arguments' names."""
    section = _ARGUMENTS.search(docstring)
    return {} if section is None else {entry[1]: entry[0] for entry in _ENTRY.finditer(section[1])}


def with_inherited_arguments(docstring: str, inherited: str) -> str:
    """Return a class's docstring in whose `Args:` section those of its base are too, unless it has its own words.

    Args:
        docstring: The class's.
        inherited: That of the class that it extends.
    """
    docstring, inherited = (f"{inspect.cleandoc(text)}\n" for text in (docstring, inherited))
    entries = "".join((documented_arguments(inherited) | documented_arguments(docstring)).values())
    if _ARGUMENTS.search(docstring) is None:
        return f"{docstring}\nArgs:\n{entries}" if entries else docstring
    return _ARGUMENTS.sub(lambda _: f"Args:\n{entries}", docstring)
