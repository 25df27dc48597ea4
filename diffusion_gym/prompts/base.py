"""The prompt set: texts, each with metadata for rewards and a weight for drawing."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import torch
from torch import Tensor

Metadata = Mapping[str, object]

_SOUNDS_LIKE_A_VOWEL = re.compile(r"[aeiou]|heir|honest|hono|hour", re.IGNORECASE)
_SOUNDS_LIKE_A_CONSONANT = re.compile(r"eu|ewe|one\b|once|uni(?![mn])|us[ae]|ukulele|uten", re.IGNORECASE)


def with_article(noun: str) -> str:
    """Return `noun` with its indefinite article by sound: "a cat", "an ant", "a unicorn", "an hourglass"."""
    vowel = _SOUNDS_LIKE_A_VOWEL.match(noun) and not _SOUNDS_LIKE_A_CONSONANT.match(noun)
    return f"{'an' if vowel else 'a'} {noun}"


def _check_text(text: object) -> None:
    """Check that it is a text.

    Raises:
        ValueError: it is no string, or has half of a surrogate pair, which no tokenizer takes.
    """
    if not isinstance(text, str):
        raise ValueError(f"a prompt must be a string, got {text!r:.80}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"a prompt must be Unicode text, got {text!r:.80}, which has half of a surrogate pair")


@dataclass(frozen=True)
class PromptSet:
    """An ordered set of prompts; a prompt's index in it is its `prompt_id`.

    Args:
        texts: The prompts, as they are, without repetition.
        metadata: Facts about each prompt for rewards (a question, an answer …); empty: none.
        weights: The weights in proportion to which prompts are drawn; empty: all are as likely.

    Raises:
        ValueError: there is no prompt, one is no Unicode text or is repeated, there is not one metadata entry or weight
            per prompt, or a weight is negative, infinite or NaN, or all are 0.
    """

    texts: tuple[str, ...]
    metadata: tuple[Metadata, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):
            raise ValueError(
                f"a prompt set is made of a sequence of prompts, got one text, {self.texts!r}: put it in a list"
            )
        for name, values in vars(self).copy().items():
            object.__setattr__(self, name, tuple(values))
        if not self.texts:
            raise ValueError("a prompt set needs at least one prompt, got none")
        for text in self.texts:
            _check_text(text)
        repeated = sorted(text for text, count in Counter(self.texts).items() if count > 1)
        if repeated:
            raise ValueError(f"prompts must differ from each other, but these are repeated: {repeated[:5]}")
        if not self.metadata:
            object.__setattr__(self, "metadata", tuple({} for _ in self.texts))
        if len(self.metadata) != len(self.texts):
            raise ValueError(f"got {len(self.metadata)} metadata entries for {len(self.texts)} prompts")
        if self.weights and len(self.weights) != len(self.texts):
            raise ValueError(f"got {len(self.weights)} weights for {len(self.texts)} prompts")
        are_weights = all(isinstance(weight, Real) and 0 <= weight < math.inf for weight in self.weights)
        if self.weights and not (are_weights and any(self.weights)):
            raise ValueError(f"the weights of prompts must be finite, at least 0 and not all 0, got {self.weights[:8]}")

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __getitem__(self, prompt_id: int) -> str:
        if prompt_id < 0:
            raise IndexError(f"prompt_id {prompt_id} is none of the set: environments say -1 of a text given to reset")
        return self.texts[prompt_id]

    def metadata_of(self, texts: Iterable[str]) -> list[Metadata]:
        """Return the metadata of each text; {} of a text that is not in the set."""
        metadata = dict(zip(self.texts, self.metadata, strict=True))
        return [metadata.get(text, {}) for text in texts]

    def draw(self, generator: torch.Generator) -> int:
        """Return the index of a random prompt, drawn uniformly or in proportion to the weights."""
        if not self.weights:
            return int(torch.randint(len(self), (1,), generator=generator))
        return int(torch.multinomial(self._weights, 1, generator=generator))

    @cached_property
    def _weights(self) -> Tensor:
        return torch.tensor(self.weights, dtype=torch.float64)
