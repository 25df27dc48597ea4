"""The prompt set and the ways to make one: by name, from a file, from a list."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..naming import unknown_name

Metadata = Mapping[str, object]

_SOUNDS_LIKE_A_VOWEL = re.compile(r"[aeiou]|heir|honest|hono|hour", re.IGNORECASE)
_SOUNDS_LIKE_A_CONSONANT = re.compile(r"eu|ewe|one\b|once|uni(?![mn])|us[ae]|ukulele|uten", re.IGNORECASE)


def with_article(noun: str) -> str:
    """Return `noun` with its indefinite article by sound: "a cat", "an ant", "a unicorn", "an hourglass"."""
    vowel = _SOUNDS_LIKE_A_VOWEL.match(noun) and not _SOUNDS_LIKE_A_CONSONANT.match(noun)
    return f"{'an' if vowel else 'a'} {noun}"


@dataclass(frozen=True)
class PromptSet:
    """An ordered set of prompts; a prompt's index in it is its `prompt_id`.

    Args:
        texts: The prompts, without repetition.
        metadata: What a reward may want to know of each prompt (a question, an answer …), or None: nothing.

    Raises:
        ValueError: there is no prompt, a prompt is repeated, or there is not one metadata entry per prompt.
    """

    texts: tuple[str, ...]
    metadata: tuple[Metadata, ...] = ()

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("a prompt set needs at least one prompt, got none")
        repeated = sorted({text for text in self.texts if self.texts.count(text) > 1})
        if repeated:
            raise ValueError(f"prompts must differ from each other, but these are repeated: {repeated[:5]}")
        if not self.metadata:
            object.__setattr__(self, "metadata", tuple({} for _ in self.texts))
        if len(self.metadata) != len(self.texts):
            raise ValueError(f"got {len(self.metadata)} metadata entries for {len(self.texts)} prompts")

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __getitem__(self, prompt_id: int) -> str:
        return self.texts[prompt_id]


def _packaged_lines(file_name: str) -> list[str]:
    text = (files(__package__) / "data" / file_name).read_text(encoding="utf-8")
    return text.splitlines()


def _simple_animals() -> PromptSet:
    """The 45 common animals of the DDPO paper, with their article: "a cat", "an ant"."""
    return PromptSet(tuple(with_article(animal) for animal in _packaged_lines("simple_animals.txt")))


def _imagenet_animals() -> PromptSet:
    """The 398 animal classes of ImageNet-1k, WordNet's synonyms joined by commas, as the DDPO codes use them."""
    return PromptSet(tuple(_packaged_lines("imagenet_animals.txt")))


_NAMED = {"simple_animals": _simple_animals, "imagenet_animals": _imagenet_animals}


def _from_file(path: Path) -> PromptSet:
    """Read a prompt a line (.txt), or a JSON object a line with the key "prompt" and metadata beside it (.jsonl)."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return PromptSet(tuple(line.strip() for line in lines))
    texts, metadata = [], []
    for number, line in enumerate(lines, start=1):
        entry = json.loads(line)
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(f'{path}, line {number}: expected a JSON object with a string "prompt", got {line[:80]}')
        texts.append(entry.pop("prompt"))
        metadata.append(entry)
    return PromptSet(tuple(texts), tuple(metadata))


def make_prompts(prompts: str | os.PathLike[str] | Sequence[str] | PromptSet) -> PromptSet:
    """Return a prompt set.

    Args:
        prompts: A name ("simple_animals": the DDPO paper's 45 animals, "a(n) …"; "imagenet_animals": the 398 of
            ImageNet), a file (.txt: a prompt a line; .jsonl: {"prompt": …, metadata …} a line), or the prompts.

    Raises:
        ValueError: the name is not known and no such file exists, or the prompts are empty or repeated.
    """
    if isinstance(prompts, PromptSet):
        return prompts
    if isinstance(prompts, str | os.PathLike):
        if prompts in _NAMED:
            return _NAMED[str(prompts)]()
        path = Path(prompts)
        if path.is_file():
            return _from_file(path)
        raise ValueError(unknown_name("prompt set (or prompt file)", os.fspath(prompts), _NAMED))
    if isinstance(prompts, Sequence) and all(isinstance(text, str) for text in prompts):
        return PromptSet(tuple(prompts))
    raise ValueError(f"prompts must be a name, a file or a sequence of strings, got {prompts!r}")
