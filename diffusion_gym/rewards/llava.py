"""A vision-language model of the LLaVA family that answers questions about images."""

from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from .base import to_uint8
from .model_based import fetch_model, pretrained

LLAVA_13B = "llava-hf/llava-1.5-13b-hf"


def fetch(source: str) -> None:
    """Fetch the files of a folder or a Hub id to this machine.

    Raises:
        ValueError: they cannot be had.
    """
    fetch_model(source, what="LLaVA", keyword="llava")
    load_processor(source)


def load_processor(source: str) -> ProcessorMixin:
    """Return the processor that makes a LLaVA's inputs from images and questions.

    Raises:
        ValueError: there is none.
    """
    load = partial(AutoProcessor.from_pretrained, trust_remote_code=False)
    return pretrained(load, source, what="LLaVA's processor", keyword="llava")


class Llava(nn.Module):
    """A model that answers questions about images: in short, decoded greedily and so the same every time.

    Source: Liu et al. 2023, Visual Instruction Tuning, https://arxiv.org/abs/2304.08485; the DDPO paper's use of it:
    https://github.com/kvablack/LLaVA-server (llava.py).

    Note:
        The published server runs the first LLaVA and gets its images as JPEGs of quality 80. This is any model that
        transformers calls image-text-to-text (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration), asked
        in the format of its own chat template, and it sees the images' bytes as they are.

    Args:
        model: The model.
        processor: Its processor.
        max_new_tokens: The longest answer, in tokens.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, *, max_new_tokens: int = 64) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # a batch's answers begin where its questions end
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def load(cls, source: str, *, dtype: torch.dtype = torch.float32, max_new_tokens: int = 64) -> "Llava":
        """Return the model of a folder or a Hub id; it is loaded in `dtype`, never in a larger one.

        Raises:
            ValueError: there is none.
        """
        load = partial(
            AutoModelForImageTextToText.from_pretrained,
            torch_dtype=dtype,  # `dtype` from 4.56 on only
            trust_remote_code=False,
        )
        model = pretrained(load, source, what="LLaVA", keyword="llava")
        return cls(model, load_processor(source), max_new_tokens=max_new_tokens)

    def chat(self, question: str) -> str:
        """Return a question about an image in the model's own format, and if it names none, in LLaVA-1.5's."""
        if self.processor.chat_template is None:
            return f"USER: <image>\n{question} ASSISTANT:"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def answer(self, images: Tensor, questions: Sequence[str]) -> list[str]:
        """Return an answer per image, which may be empty.

        Args:
            images: [B, 3, H, W], RGB in [0, 1].
            questions: One per image.
        """
        inputs = self.processor(
            images=[Image.fromarray(pixels) for pixels in to_uint8(images).numpy()],
            text=[self.chat(question) for question in questions],
            padding=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
