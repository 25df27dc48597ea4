"""The alignment of an emoji with its prompt, by a small CLIP-like scorer that comes with the package."""

import json
from collections.abc import Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, ResNetModel
from typing_extensions import override

from ..loading import no_progress_bar
from .base import Metadata, Reward, RewardOutput

IMAGE_SIZE = 64


def prepare(images: Tensor) -> Tensor:
    """Return images [B, 3, 64, 64] in [0, 1] as a ResNet's inputs: twice the size, for its stem divides by 4."""
    doubled = F.interpolate(images * 2 - 1, scale_factor=2.0, mode="bilinear", align_corners=False)
    return doubled.contiguous(memory_format=torch.channels_last)


class EmojiScorer(nn.Module):
    """Two encoders whose embeddings of a picture and of its caption point the same way.

    Args:
        image_encoder: A ResNet; its pooled features are the image's embedding.
        text_encoder: A CLIP text encoder with a projection to the same width.
        tokenizer: The text encoder's.
        scale: The inverse temperature that the embeddings were trained with.
    """

    def __init__(
        self,
        image_encoder: ResNetModel,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        *,
        scale: float,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.scale = scale

    @classmethod
    def load(cls, folder: Path, tokenizer: Path | None = None) -> "EmojiScorer":
        """Return the scorer that `save` wrote, frozen, in float32.

        Args:
            folder: The scorer's folder.
            tokenizer: The tokenizer's folder; None: in `folder`.
        """
        with no_progress_bar():
            image_encoder = ResNetModel.from_pretrained(folder / "image_encoder")
            text_encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder")
        scorer = cls(
            image_encoder.float(),
            text_encoder.float(),
            CLIPTokenizer.from_pretrained(tokenizer or folder / "tokenizer"),
            scale=json.loads((folder / "scorer.json").read_text())["scale"],
        )
        return scorer.eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write the encoders, the tokenizer and the temperature."""
        self.image_encoder.save_pretrained(folder / "image_encoder")
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        (folder / "scorer.json").write_text(json.dumps({"scale": self.scale}) + "\n")

    def embed_images(self, images: Tensor) -> Tensor:
        """Return the embeddings [B, E], of length 1, of images [B, 3, H, W] in [0, 1]; differentiable."""
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            size = (IMAGE_SIZE, IMAGE_SIZE)
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        return F.normalize(self.image_encoder(prepare(images)).pooler_output.flatten(1), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings [P, E], of length 1, of texts."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids = tokens.input_ids.to(self.text_encoder.device)
        return F.normalize(self.text_encoder(ids).text_embeds, dim=-1)


def load_packaged_scorer() -> EmojiScorer:
    """Return the scorer that comes with the package; it shares the embedded model's tokenizer."""
    package = Path(str(files("diffusion_gym")))
    return EmojiScorer.load(package / "rewards" / "emoji_scorer", package / "models" / "emoji" / "tokenizer")


class EmojiAlignment(Reward):
    """The cosine similarity of an emoji and its prompt, by the scorer that comes with the package.

    The offline stand-in for CLIP or ImageReward: it works for what the embedded model draws and for nothing else, and
    like those it can be fooled (the scorer's model card shows how). Differentiable in the images.

    Args:
        among: None: the reward is the cosine similarity, in [−1, 1]. A sequence of prompts: it is the log-probability
            of the prompt among them, log softmax(scale·cosine), at most 0: how sure the scorer is that the image shows
            this prompt and none of the others.

    Raises:
        ValueError: a prompt of `among` is repeated, or, when called, an image's prompt is not one of them.
    """

    name = "emoji_alignment"

    def __init__(self, among: Sequence[str] | None = None) -> None:
        if among is not None and len(set(among)) != len(among):
            raise ValueError("the prompts to choose among must differ from each other")
        self.among = None if among is None else tuple(among)
        self.unit = "1" if among is None else "nat"
        self.range = (-1.0, 1.0) if among is None else (-float("inf"), 0.0)

    @cached_property
    def _scorer(self) -> EmojiScorer:
        with torch.inference_mode(False):  # gradients are taken through it, whoever asks first
            return load_packaged_scorer()

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        texts = list(dict.fromkeys(prompts)) if self.among is None else list(self.among)
        unknown = [prompt for prompt in prompts if prompt not in texts]
        if unknown:
            raise ValueError(f"prompt {unknown[0]!r} is not one of the {len(texts)} that the reward chooses among")
        scorer = self._scorer.to(images.device)
        cosine = scorer.embed_images(images.float()) @ scorer.embed_texts(texts).T
        values = cosine if self.among is None else F.log_softmax(scorer.scale * cosine, dim=-1)
        index = torch.tensor([texts.index(prompt) for prompt in prompts], device=images.device)
        return RewardOutput(values.gather(1, index[:, None])[:, 0])
