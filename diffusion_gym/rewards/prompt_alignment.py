"""The DDPO paper's prompt alignment: a vision-language model describes the image, and BERTScore compares."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from ..checks import checked_integer
from . import bertscore, llava
from .base import Metadata, RewardOutput
from .bertscore import DEBERTA, BertScore
from .llava import LLAVA_13B, Llava
from .model_based import ModelReward

QUESTION = "Answer concisely: what is going on in this image?"
REFERENCE = "The image contains {prompt}"


class PromptAlignment(ModelReward[Llava]):
    """The DDPO paper's alignment reward: the BERTScore recall of LLaVA's description against the prompt.

    With the defaults LLaVA-1.5-13B takes 26 GB in half precision and DeBERTa 3 GB, and LLaVA writes up to 64 tokens for
    every image: give them a device of their own.

    The extras are `bertscore_precision`, `bertscore_f1` and `empty_description`: 1 where the model said nothing, for
    which the reward is 0 (a 7B model was reported to do so, https://github.com/kvablack/LLaVA-server/issues/4). Scores
    start high: pure noise was reported to have 0.82 (https://github.com/kvablack/ddpo-pytorch/issues/23).

    Source: Black et al. 2023, section 5.2, https://arxiv.org/abs/2305.13301, and the code of
    https://github.com/kvablack/ddpo-pytorch (rewards.py) and https://github.com/kvablack/LLaVA-server.

    Note:
        The paper words the question "what is happening in this image?"; this is the code's. `Llava` says what else
        differs from it.

    Args:
        llava: The model that describes: a folder or a Hub id of the LLaVA family (LLaVA-1.5, LLaVA-NeXT).
        bert_score: The model that compares: a folder or a Hub id.
        num_layers: Its layer that embeds; None: the one that bert-score's authors found best for this id.
        question: The question to the first.
        reference: The text that its answer is compared with; "{prompt}" stands for the prompt.
        max_new_tokens: The longest description, in tokens.
        device: The device of both; None: that of the first images.
        dtype: The type that LLaVA computes in; BERTScore is float32.
        batch_size: The most images described at once.

    Raises:
        ValueError: `reference` has no "{prompt}", or, when called, it is empty with a prompt or a model cannot be had.
    """

    name = "prompt_alignment"
    range = (-1.0, 1.0)

    def __init__(
        self,
        *,
        llava: str = LLAVA_13B,
        bert_score: str = DEBERTA,
        num_layers: int | None = None,
        question: str = QUESTION,
        reference: str = REFERENCE,
        max_new_tokens: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float16,
        batch_size: int = 16,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        if "{prompt}" not in reference:
            raise ValueError(f'reference must contain "{{prompt}}", got {reference!r}')
        self.llava = llava
        self.bert_score = bert_score
        self.num_layers = None if num_layers is None else checked_integer("num_layers", num_layers, at_least=1)
        self.question = question
        self.reference = reference
        self.max_new_tokens = checked_integer("max_new_tokens", max_new_tokens, at_least=1)

    @override
    def load(self) -> Llava:
        return Llava.load(self.llava, dtype=self.dtype, max_new_tokens=self.max_new_tokens)

    @override
    def make_ready(self) -> None:
        bertscore.fetch(self.bert_score, self.num_layers)
        llava.fetch(self.llava)

    @cached_property
    def compare(self) -> BertScore:
        """The BERTScore that compares sentences."""
        assert self.device is not None
        return BertScore(self.bert_score, num_layers=self.num_layers, device=self.device)

    @override
    def load_rest(self) -> None:
        self.compare  # noqa: B018

    def describe(self, images: Tensor) -> list[str]:
        """Return LLaVA's descriptions of images [B, 3, H, W] in [0, 1]."""
        return self.network.answer(images, [self.question] * len(images))

    @override
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> RewardOutput:
        references = [self.reference.replace("{prompt}", prompt) for prompt in prompts]
        for prompt, reference in zip(prompts, references, strict=True):
            if not reference.strip():
                raise ValueError(f"there is nothing to compare with for the prompt {prompt!r}: say more in reference=")
        compare = self.compare  # first: it is the smaller one to find missing
        descriptions = self.describe(images)
        precision, recall, f1 = compare(descriptions, references)
        empty = torch.tensor([float(not description) for description in descriptions])
        return RewardOutput(recall, {"bertscore_precision": precision, "bertscore_f1": f1, "empty_description": empty})
