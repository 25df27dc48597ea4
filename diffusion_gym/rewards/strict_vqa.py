"""The strict VQA reward: a vision-language model answers the prompt's questions about the image."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from ..checks import checked_integer
from .base import Metadata, RewardOutput
from .llava import LLAVA_13B, Llava, fetch
from .model_based import ModelReward


class StrictVQA(ModelReward[Llava]):
    """The share of a prompt's questions that LLaVA answers rightly: the answer occurs, as spelled, in what it says.

    r = mean_i [answer_i in response_i]

    Questions and answers are the prompt's metadata, {"questions": [...], "answers": [...]}: those of the DDPO paper's
    counting prompts, or a `.jsonl` file's. With the default it takes 26 GB for LLaVA-1.5-13B in half precision.

    Source: Black et al. 2023, appendix on typographic attacks, https://arxiv.org/abs/2305.13301;
    https://github.com/kvablack/ddpo-pytorch (rewards.py, `llava_strict_satisfaction`).

    Note:
        As in the published code "four" is not found in "Four dogs", but in "fourteen dogs" it is.

    Args:
        llava: The model: a folder or a Hub id of the LLaVA family.
        max_new_tokens: The longest response, in tokens.
        device: The model's device; None: that of the first images.
        dtype: The type that it computes in.
        batch_size: The most images at once, each with all its questions.

    Raises:
        ValueError: when called: a prompt has no such metadata, or the model cannot be had.
    """

    name = "strict_vqa"
    range = (0.0, 1.0)

    def __init__(
        self,
        *,
        llava: str = LLAVA_13B,
        max_new_tokens: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float16,
        batch_size: int = 4,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        self.llava = llava
        self.max_new_tokens = checked_integer("max_new_tokens", max_new_tokens, at_least=1)

    @override
    def make_ready(self) -> None:
        fetch(self.llava)

    @override
    def load(self) -> Llava:
        return Llava.load(self.llava, dtype=self.dtype, max_new_tokens=self.max_new_tokens)

    @override
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> RewardOutput:
        examinations = [
            questions_and_answers(prompt, of_prompt)
            for prompt, of_prompt in zip(prompts, metadata or [{}] * len(prompts), strict=True)
        ]
        owner = torch.tensor([image for image, (questions, _) in enumerate(examinations) for _ in questions])
        questions = [question for questions, _ in examinations for question in questions]
        responses = self.network.answer(images[owner.to(images.device)], questions)
        answers = [answer for _, answers in examinations for answer in answers]
        is_right = torch.tensor(
            [float(answer in response) for answer, response in zip(answers, responses, strict=True)]
        )
        total = torch.zeros(len(images)).index_add(0, owner, is_right)
        return RewardOutput(total / owner.bincount(minlength=len(images)))


def questions_and_answers(prompt: str, metadata: Metadata) -> tuple[list[str], list[str]]:
    """Return a prompt's questions and their answers.

    Raises:
        ValueError: they are missing, or not lists of strings of the same length, at least 1.
    """
    questions, answers = (_texts(metadata.get(key)) for key in ("questions", "answers"))
    if not questions or len(questions) != len(answers):
        raise ValueError(
            'strict_vqa needs the metadata {"questions": ["..."], "answers": ["..."]} of every prompt, with as many '
            f"answers as questions; of {prompt!r} it got {dict(metadata)}. Take a prompt set that has them or a "
            '.jsonl file: {"prompt": "two cats", "questions": ["How many cats are there?"], "answers": ["two"]} a line.'
        )
    return questions, answers


def _texts(value: object) -> list[str]:
    """Return a list of strings as it is, and an empty one for anything else."""
    return list(value) if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value) else []
