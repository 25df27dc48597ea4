"""The ways to make a prompt set: by name, from a file, from a Hugging Face dataset, from a list."""

import csv
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..lines import read_json_lines, read_lines
from ..naming import unknown_name
from .base import Metadata, PromptSet
from .sets import NAMED

_COLUMNS = ("prompt", "prompts", "text", "caption")
_DATASET = "datasets:"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@contextmanager
def _naming(source: object) -> Iterator[None]:
    """Have errors of what is read from the source name it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _prompt_column(columns: Iterable[str]) -> str:
    """Return the column that holds the prompts."""
    columns = list(columns)
    lowered = {column.strip().lower(): column for column in reversed(columns)}
    for name in _COLUMNS:
        if name in lowered:
            return lowered[name]
    raise ValueError(f"no column is named one of {_COLUMNS}; there are {columns}")


def _from_rows(rows: Iterable[Mapping[str, object]], column: str, source: object) -> PromptSet:
    """Return each prompt with the rest of its first row as metadata; repetitions are left out, with a warning."""
    first: dict[str, Metadata] = {}
    repeated = 0
    for number, row in enumerate(rows, start=1):
        entry = dict(row)
        text = entry.pop(column)
        if None in entry:
            raise ValueError(f"row {number}: more cells than columns; a text with a comma needs quotes")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"row {number}: expected a text in the column {column!r}, got {text!r}")
        repeated += text.strip() in first
        first.setdefault(text.strip(), entry)
    if repeated:
        warnings.warn(f"{source}: {repeated} repeated prompts were left out", stacklevel=2)
    return PromptSet(tuple(first), tuple(first.values()))


def _from_table(path: Path) -> PromptSet:
    """Read a table with a header: one column is the prompts, the others are metadata."""
    with path.open(encoding="utf-8-sig", newline="") as opened:
        rows = csv.DictReader(opened, delimiter=_DELIMITERS[path.suffix.lower()])
        return _from_rows(rows, _prompt_column(rows.fieldnames or ()), path)


def _from_json_lines(path: Path) -> PromptSet:
    """Read a JSON object a line, with the key "prompt" and metadata beside it."""
    texts, metadata = [], []
    for number, line, entry in read_json_lines(path):
        if not isinstance(entry.get("prompt"), str):
            raise ValueError(f'line {number}: expected a JSON object with a string "prompt", got {line[:80]}')
        texts.append(entry.pop("prompt"))
        metadata.append(entry)
    return PromptSet(tuple(texts), tuple(metadata))


def _from_text(path: Path) -> PromptSet:
    """Read a prompt a line."""
    return PromptSet(tuple(line.strip() for line in read_lines(path) if line.strip()))


_READERS = {".txt": _from_text, ".jsonl": _from_json_lines, ".csv": _from_table, ".tsv": _from_table}


def _from_file(path: Path) -> PromptSet:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"{path}: {unknown_name('suffix of a prompt file', suffix, _READERS)}")
    with _naming(path):
        return _READERS[suffix](path)


def prompts_from_dataset(source: str, *, split: str = "train", column: str | None = None) -> PromptSet:
    """Return the prompts of a Hugging Face dataset, the other columns as metadata; repetitions are left out.

    Args:
        source: Its id on the Hub, or a folder of data files.
        split: Which part of it.
        column: Where the prompts are; None: the column "prompt", "prompts", "text" or "caption", in any case.

    Raises:
        ImportError: the package `datasets` is missing.
        ValueError: there is no such column.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            'prompts of a Hugging Face dataset need the package datasets: pip install "diffusion-gym[datasets]"'
        ) from error
    rows = load_dataset(source, split=split)
    if column is not None and column not in rows.column_names:
        raise ValueError(f"{source} has no column {column!r}; there are {rows.column_names}")
    with _naming(source):
        return _from_rows(rows, column or _prompt_column(rows.column_names), source)


def make_prompts(
    prompts: str | os.PathLike[str] | Sequence[str] | Mapping[str, float] | PromptSet,
) -> PromptSet:
    """Return a prompt set.

    Args:
        prompts: A name of `diffusion_gym.prompts.sets` ("simple_animals": the DDPO paper's 45 animals); a file (.txt: a
            prompt a line; .jsonl: {"prompt": …, metadata …} a line; .csv, .tsv: a column "prompt" or "Prompts", the
            others are metadata); "datasets:ID" for a Hugging Face dataset's split "train", "datasets:ID:SPLIT" for
            another; the prompts; or {prompt: weight}, which are drawn in proportion to their weights.

    Raises:
        ValueError: the name is not known and no such file exists, a file cannot be read, or the prompts are empty or
            repeated.
        ImportError: it is a dataset's id, and the package `datasets` is missing.
    """
    if isinstance(prompts, PromptSet):
        return prompts
    if isinstance(prompts, str) and prompts.startswith(_DATASET):
        source, _, split = prompts.removeprefix(_DATASET).partition(":")
        if not source:
            raise ValueError(f'prompts of a dataset are "datasets:ID" or "datasets:ID:SPLIT", got {prompts!r}')
        return prompts_from_dataset(source, split=split or "train")
    if isinstance(prompts, str | os.PathLike):
        if prompts in NAMED:
            return NAMED[str(prompts)]()
        path = Path(prompts)
        if path.is_file():
            return _from_file(path)
        if not isinstance(prompts, str) or path.suffix.lower() in _READERS:
            raise ValueError(f"there is no file {str(path)!r} of prompts")
        unknown = unknown_name("prompt set (or prompt file)", prompts, NAMED)
        raise ValueError(f"{unknown} A prompt itself stands in a list: {[prompts]}")
    if isinstance(prompts, Mapping):
        return PromptSet(tuple(prompts), weights=tuple(prompts.values()))
    if isinstance(prompts, Sequence) and all(isinstance(text, str) for text in prompts):
        return PromptSet(tuple(prompts))
    raise ValueError(f"prompts must be a name, a file or a sequence of strings, got {prompts!r}")
