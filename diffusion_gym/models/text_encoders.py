"""The text encoders of a diffusers folder, each with its tokenizer: examined at once, loaded when first used."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PretrainedConfig, PreTrainedModel

from .folders import check_weights, empty_network, find_weights, read_config
from .offloading import lent
from .understood import Values, is_count


class TextEncoder:
    """A tokenizer and the network that reads its tokens.

    Args:
        path: The pipeline's folder.
        name: The network's subfolder; the tokenizer's is `tokenizer` with the same ending.
        variant: The variant of the weights.
        network: The network's class.
        config: Its configuration's class.
        tokenizer: The tokenizer's class.
        limit: The most tokens of a prompt; None: as many as the tokenizer and the network take. T5 takes any number, so
            it is given exactly as many.

    Attributes:
        config: The network's configuration.
        limit: The most tokens of a prompt, first and last mark among them.
        device: The device that the network is lent to while it reads; None: it stays where it is.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or one does not fit the others.
    """

    def __init__(
        self,
        path: Path,
        name: str = "text_encoder",
        *,
        variant: str | None,
        network: type[PreTrainedModel] = CLIPTextModel,
        config: type[PretrainedConfig] = CLIPTextConfig,
        tokenizer: type[Any] = CLIPTokenizer,
        limit: int | None = None,
    ) -> None:
        self.name, self.network = name, network
        self.device: torch.device | None = None
        self._folder = path / name
        self._tokenizer_folder = path / name.replace("text_encoder", "tokenizer")
        self._tokenizer_type = tokenizer
        file = self._folder / "config.json"
        values = read_config(file)
        if not isinstance(values.get("model_type", ""), str | None):
            raise ValueError(f"{file}: model_type must be a text, got {values['model_type']!r}: {Values.cure}")
        empty = empty_network(lambda: network(config.from_dict(values)), file)
        self.config: Any = empty.config
        end = getattr(self.config, "eos_token_id", None)
        if config is CLIPTextConfig and not is_count(end, minimum=0):
            raise ValueError(f"{file}: eos_token_id must be a whole number, got {end!r}: {Values.cure}")
        self.weights, self.variant = find_weights(self._folder, "model", variant)
        check_weights(empty, self.weights, prefix="text_model.")
        self.limit = self._examined_limit(limit)

    def _examined_limit(self, limit: int | None) -> int:
        """Return the most tokens of a prompt, after a check of the tokenizer."""
        folder = self._tokenizer_folder
        if not any(
            all((folder / file).is_file() for file in files)
            for files in (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
        ):
            raise FileNotFoundError(
                f"{folder} has no vocabulary: neither tokenizer.json, nor vocab.json and merges.txt, nor spiece.model"
            )
        vocabulary, longest = len(self.tokenizer), self.tokenizer.model_max_length
        if vocabulary > self.config.vocab_size:
            raise ValueError(
                f"{folder} knows {vocabulary} tokens, the text encoder {self.config.vocab_size} (vocab_size): they do "
                "not belong together"
            )
        positions = getattr(self.config, "max_position_embeddings", None)  # T5's are relative
        if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 2:
            cure = "restore the file" if positions is None else f"{positions} is the text encoder's own"
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: model_max_length must be a number above 2 (first and last token "
                f"are marks), got {longest!r}: {cure}"
            )
        if positions is None and limit is not None:
            return limit
        return int(min(bound for bound in (longest, positions, limit) if bound is not None))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        try:
            return self._tokenizer_type.from_pretrained(self._tokenizer_folder, trust_remote_code=False)
        except Exception as error:  # whatever the library stumbles over: the folder is the only input
            raise ValueError(
                f"{self._tokenizer_folder} holds no tokenizer that can be read ({type(error).__name__}: {error}): "
                "restore the files that came with the model"
            ) from error

    def outputs(self, network: nn.Module, prompts: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Return what the network says of each prompt, padded to `limit` tokens, with its hidden states.

        The prompts are read one by one, so that a prompt's embedding does not depend on which others are asked for
        with it; and each when it is asked for, so that the hidden states of a large network are held for one alone.

        Args:
            network: The loaded network.
            prompts: The texts; of one that has more than `limit` tokens the rest is not seen, with a warning.
        """
        lengths = [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids]
        cut = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > self.limit]
        if cut:
            warnings.warn(
                f"{len(cut)} prompts are longer than the {self.limit} tokens of the text encoder, which "
                f"does not see what is beyond, so that long prompts may look alike: {cut[0]!r} is the first",
                stacklevel=3,
            )
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.limit, truncation=True, return_tensors="pt"
        )
        return self._read(network, tokens.input_ids, tokens.attention_mask)

    def hidden_and_pooled(self, network: nn.Module, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last hidden layer but one [P, limit, D] and the projected embedding [P, D'] of each prompt.

        The arguments are those of `outputs`.
        """
        rows = [(output["hidden_states"][-2], output["text_embeds"]) for output in self.outputs(network, prompts)]
        return stacked(hidden for hidden, _ in rows), stacked(pooled for _, pooled in rows)

    def _read(self, network: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[Mapping[str, Any]]:
        """Return what the network says of each row of tokens [P, limit]."""
        masked = getattr(self.config, "use_attention_mask", False)
        with lent(network, self.device) as device:
            ids, mask = ids.to(device), mask.to(device)
            for row in range(len(ids)):
                yield network(
                    ids[row : row + 1],
                    attention_mask=mask[row : row + 1] if masked else None,
                    output_hidden_states=True,
                )


def stacked(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return one tensor [P, …] of tensors [1, …], one for each prompt, in float32."""
    return torch.cat([row.float() for row in rows])
