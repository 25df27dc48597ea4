"""Make the tokenizer: byte-pair merges by which every word of the captions is one token.

    python -m tools.emoji.tokenizer

writes `build/emoji/tokenizer` (seconds). Merges that are equally frequent come in any order, so the ids of the same
words differ from run to run: trained weights belong to the tokenizer that they were trained with.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, CLIPTokenizerFast

from .dataset import COLOURS
from .export import write_vocabulary
from .icons import ANIMALS, Icon
from .sources import WORK

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CONTEXT = 16
OTHER_WORDS = (
    *("a", "an", "the", "on", "background", "emoji", "of", "and", "with", "photo", "picture", "image", "style"),
    *("colorful", "bright", "dark", "small", "big", "cute", "simple"),
)
# CLIP's own splitting: https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py.
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def words_of(icons: Iterable[Icon]) -> list[str]:
    """Return every word that a caption may have, sorted."""
    words = {word for icon in icons for caption in icon.captions for word in caption.lower().split()}
    return sorted(words | set(COLOURS) | set(OTHER_WORDS))


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the byte-pair merges that make every word one token; those of animals and colours come first."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END, continuing_subword_prefix="", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=20_000,
        min_frequency=2,
        end_of_word_suffix=WORD_END,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    repeated = [word for word in words for _ in range(40 if word in ANIMALS or word in COLOURS else 8)]
    tokenizer.train_from_iterator(repeated, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def clip_vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return the ids in CLIP's order: bytes, bytes that end a word, merges, start, end (the highest)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet), *(first + second for first, second in merges)]
    return {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}


def build(icons: Iterable[Icon], folder: Path) -> CLIPTokenizer:
    """Write and return the tokenizer of the icons' captions."""
    merges = learn_merges(words_of(icons))
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folder, clip_vocabulary(merges), merges)
    CLIPTokenizerFast.from_pretrained(folder, model_max_length=CONTEXT).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


@dataclass
class Args:
    """Make the tokenizer."""

    work: Path = WORK
    """Where everything is read and written."""


def main(args: Args) -> None:
    lines = (args.work / "icons" / "icons.jsonl").read_text().splitlines()
    tokenizer = build([Icon(**json.loads(line)) for line in lines], args.work / "tokenizer")
    print(f"{args.work / 'tokenizer'}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
