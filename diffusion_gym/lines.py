"""Text files that are read line by line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(file: Path) -> list[str]:
    """Return a file's lines, separated by line feeds alone: a text may hold other separators, such as U+2028."""
    return file.read_text(encoding="utf-8-sig").split("\n")


def read_json_lines(file: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield the number of each line that is not blank, its text, and its JSON object: {} where it holds none."""
    for number, line in enumerate(read_lines(file), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                entry = None
            yield number, line, entry if isinstance(entry, dict) else {}
