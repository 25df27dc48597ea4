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
_ELSEWHERE = {
    "negative_prompt": 'give one for all to the environment, negative_prompt="…"',
    "weight": "give {prompt: weight} as the prompts",
    "seed": "give seeds to reset, reset(seed=…)",
    "guidance_scale": "give one for all to the policy, guidance_scale=…",
}
"""Columns of prompt files that have no effect, with the argument to use instead."""
_DATASET = "datasets:"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@contextmanager
def _naming(source: object) -> Iterator[None]:
    """The context whose errors name the source."""
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


def _prompt_set(
    rows: Iterable[tuple[str, object, Metadata]], source: object, weights: Iterable[float] = ()
) -> PromptSet:
    """Return the prompt set of the rows of any source.

    Spaces around a prompt are cut off. A repeated prompt is one prompt, with the metadata of its first row and the sum
    of the weights, which are 1 where none are given; blank prompts and comments ("# …") are left out. A warning says
    so, but for the spaces.

    Args:
        rows: The place of each, the prompt and its metadata.
        source: The source, for the warnings.
        weights: One per row, or none.
    """
    metadata: dict[str, Metadata] = {}
    totals: dict[str, float] = {}
    repeated, differing, left_out = 0, 0, []
    remaining_weights = iter(weights)
    for place, text, entry in rows:
        weight = next(remaining_weights, 1)
        if not isinstance(text, str | None):
            raise ValueError(f"{place}: a prompt must be a string, got {text!r:.80}")
        text = (text or "").strip()
        if not text or _is_comment(text):
            left_out.append(place)
        elif text in metadata:
            repeated += 1
            differing += metadata[text] != entry
            totals[text] += weight
        else:
            metadata[text], totals[text] = entry, weight
    prompts = PromptSet(
        tuple(metadata), tuple(metadata.values()), tuple(totals.values()) if weights or repeated else ()
    )
    for message in _remarks(metadata.values(), left_out=left_out, repeated=repeated, differing=differing):
        warnings.warn(f"{source}: {message}", stacklevel=4)
    return prompts


def _remarks(metadata: Iterable[Metadata], *, left_out: Sequence[str], repeated: int, differing: int) -> Iterator[str]:
    """Yield the warnings about prompts that were read."""
    if left_out:
        yield (
            f"{len(left_out)} blank prompts or comments (# …) are left out, the first is {left_out[0]}; "
            "a prompt that is meant so goes into a PromptSet"
        )
    if repeated:
        others = f"; {differing} of them have other metadata than the first, whose are kept" if differing else ""
        yield f"{repeated} prompts are repetitions: a prompt is drawn as often as it stands there{others}"
    for column in dict.fromkeys(key for entry in metadata for key in entry):
        cure = _ELSEWHERE.get(str(column).strip().lower().replace(" ", "_"))
        if cure is not None:
            yield f"{column!r} goes to the reward as metadata and changes no image: {cure}"


def _is_comment(text: str) -> bool:
    return text == "#" or text.startswith(("# ", "#\t"))


def _from_rows(
    rows: Iterable[tuple[str, Mapping[str, object]]], source: object, column: str | None = None
) -> PromptSet:
    """Return each row's text in a column, with the rest of the row as metadata.

    Args:
        rows: The place of each, and its cells.
        source: The source, for the warnings.
        column: The prompts' column; None: it is found in the first row.
    """

    def parts() -> Iterator[tuple[str, object, Metadata]]:
        name = column
        for place, row in rows:
            name = name or _prompt_column(row)
            if name not in row:
                raise ValueError(f"{place}: there is no {name!r}, which holds the prompts; there are {list(row)}")
            yield place, row[name], {key: value for key, value in row.items() if key != name}

    return _prompt_set(parts(), source)


def _from_table(path: Path) -> PromptSet:
    """Read a table with a header: one column is the prompts, the others are metadata."""

    def rows() -> Iterator[tuple[str, Mapping[str, object]]]:
        for row in table:
            if None in row:
                raise ValueError(f"line {table.line_num}: more cells than columns; a text with a comma needs quotes")
            yield f"line {table.line_num}", row

    with path.open(encoding="utf-8-sig", newline="") as opened:
        table = csv.DictReader(opened, delimiter=_DELIMITERS[path.suffix.lower()])
        return _from_rows(rows(), path, _prompt_column(table.fieldnames or ()))


def _from_json_lines(path: Path) -> PromptSet:
    """Read a file with a JSON object on each line: one of its keys is the prompt, the others are metadata."""

    def rows() -> Iterator[tuple[str, Mapping[str, object]]]:
        for number, line, entry in read_json_lines(path):
            if not entry and not _is_comment(line.strip()):
                raise ValueError(f'line {number}: expected a JSON object like {{"prompt": "a fox"}}, got {line[:80]}')
            yield f"line {number}", entry or {"prompt": line}

    return _from_rows(rows(), path)


def _from_text(path: Path) -> PromptSet:
    """Read a file with a prompt on each line."""
    lines = enumerate(read_lines(path), start=1)
    return _prompt_set(((f"line {number}", line, {}) for number, line in lines if line.strip()), path)


_READERS = {".txt": _from_text, ".jsonl": _from_json_lines, ".csv": _from_table, ".tsv": _from_table}


def _from_file(path: Path) -> PromptSet:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"{path}: {unknown_name('suffix of a prompt file', suffix, _READERS)}")
    with _naming(path):
        return _READERS[suffix](path)


def prompts_from_dataset(source: str, *, split: str = "train", column: str | None = None) -> PromptSet:
    """Return the prompts of a Hugging Face dataset, the other columns as metadata.

    Columns of bytes (pictures, sounds, films) are left out: they would fill the memory.

    Args:
        source: The dataset's id on the Hub, or a folder of data files.
        split: The split to read.
        column: The prompts' column; None: the column "prompt", "prompts", "text" or "caption", in any case.

    Raises:
        ImportError: the package `datasets` is missing.
        ValueError: there is no such column, or a prompt is no string.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            'prompts of a Hugging Face dataset need the package datasets: pip install "diffusion-gym[datasets]"'
        ) from error
    table = load_dataset(source, split=split)
    if column is not None and column not in table.column_names:
        raise ValueError(f"{source} has no column {column!r}; there are {table.column_names}")
    with _naming(source):
        column = column or _prompt_column(table.column_names)
        columns = table.select_columns(
            [field.name for field in table.features.arrow_schema if "binary" not in str(field.type)]
        )
        return _from_rows(((f"row {number}", row) for number, row in enumerate(columns, start=1)), source, column)


def make_prompts(
    prompts: str | os.PathLike[str] | Sequence[str] | Mapping[str, float] | PromptSet,
) -> PromptSet:
    """Return a prompt set.

    A `PromptSet` is taken as it is. In all other sources, spaces around a prompt are cut off, a prompt given twice
    is drawn twice as often (its weight is 2), blank prompts and comments ("# …") are left out, and a warning says so.

    Args:
        prompts: A name of `diffusion_gym.prompts.sets` ("simple_animals": the DDPO paper's 45 animals); a file (.txt: a
            prompt a line; .jsonl: an object a line; .csv, .tsv: a table with a header); "datasets:ID" for a Hugging
            Face dataset's split "train", "datasets:ID:SPLIT" for another; the prompts; or {prompt: weight}, which are
            drawn in proportion to their weights. Of objects, tables and datasets "prompt", "prompts", "text" or
            "caption" holds the prompts, in any case, and all else is metadata.

    Raises:
        ValueError: the name is not known and no such file exists, a file cannot be read, a prompt is no text, or there
            is none.
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
    if not isinstance(prompts, Sequence | Mapping):
        raise ValueError(f"prompts must be a name, a file or a sequence of strings, got {prompts!r:.80}")
    weights = tuple(prompts.values()) if isinstance(prompts, Mapping) else ()
    numbered = enumerate(prompts, start=1)
    return _prompt_set(((f"prompt {number}", text, {}) for number, text in numbered), "prompts", weights)
