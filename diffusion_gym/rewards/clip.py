"""The base of the rewards that compare an image with its prompt by CLIP, and the two that add nothing else."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase
from typing_extensions import override

from .base import Metadata, RewardOutput
from .image_preparation import ImagePreparation
from .model_based import ModelReward, fetch_model, pretrained

_CACHED_PROMPTS = 4096


def embed_images(clip: CLIPModel, pixel_values: Tensor) -> Tensor:
    """Return the embeddings [B, E], float32 and of length 1, of prepared images."""
    pooled = clip.vision_model(pixel_values=pixel_values).pooler_output
    return F.normalize(clip.visual_projection(pooled).float(), dim=-1)


def embed_texts(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Return the embeddings [P, E], float32 and of length 1; texts are cut where CLIP's context ends."""
    tokens = tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=clip.config.text_config.max_position_embeddings,
        return_tensors="pt",
    ).to(clip.device)
    pooled = clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    return F.normalize(clip.text_projection(pooled).float(), dim=-1)


class ClipReward(ModelReward[CLIPModel]):
    """A reward by the cosine similarity of CLIP's embeddings of an image and of its prompt.

    Args:
        clip: CLIP: a folder, or an id on the Hub.
        processor: The source of its tokenizer and its `preprocessor_config.json`: a folder, or an id on the Hub.
        device: See `ModelReward`.
        dtype: See `ModelReward`; embeddings are compared in float32 whatever it is.
        batch_size: See `ModelReward`.
    """

    def __init__(
        self,
        *,
        clip: str | Path,
        processor: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        self.clip = clip
        self.processor = processor
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()

    @override
    def load(self) -> CLIPModel:
        return pretrained(CLIPModel.from_pretrained, self.clip, what=f"the CLIP of {self.name}", keyword="clip")

    @override
    def make_ready(self) -> None:
        fetch_model(self.clip, what=f"the CLIP of {self.name}", keyword="clip")
        self.load_rest()

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        load = partial(AutoTokenizer.from_pretrained, trust_remote_code=False)
        return pretrained(load, self.processor, what="CLIP's tokenizer", keyword="processor")

    @cached_property
    def _prepare(self) -> ImagePreparation:
        what = "CLIP's preprocessor_config.json"
        return pretrained(ImagePreparation.load, self.processor, what=what, keyword="processor")

    @override
    def load_rest(self) -> None:
        self._tokenizer, self._prepare  # noqa: B018

    def prepare(self, images: Tensor) -> Tensor:
        """Return images [B, 3, H, W] in [0, 1] as CLIP's inputs."""
        return self._prepare(images)

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine similarity of each image and its prompt, [B] float32."""
        text_embeds = torch.stack([self._embedding(prompt) for prompt in prompts])
        return (embed_images(self.network, self.prepare(images)) * text_embeds).sum(-1)

    def _embedding(self, prompt: str) -> Tensor:
        """Return a prompt's embedding [E], computed once and by itself: it does not depend on the rest of the batch."""
        if prompt not in self._embeddings:
            self._embeddings[prompt] = embed_texts(self.network, self._tokenizer, [prompt])[0]
        self._embeddings.move_to_end(prompt)
        if len(self._embeddings) > _CACHED_PROMPTS:
            self._embeddings.popitem(last=False)
        return self._embeddings[prompt]

    @abstractmethod
    @override
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> RewardOutput: ...


class ClipScore(ClipReward):
    """cos(e_image, e_text), in [−1, 1]; about 0.2 to 0.35 for an image and its caption.

    Source: Radford et al., 2021, https://arxiv.org/abs/2103.00020; as a score of captions: Hessel et al., 2021,
    https://arxiv.org/abs/2104.08718, who report 2.5·max(cos, 0) of CLIP ViT-B/32 and put "A photo depicts" before the
    caption (torchmetrics: 100·max(cos, 0)). Here it is the cosine, with the prompt as it is. CLIP ViT-L/14 has 428 M
    parameters, 1.7 GB in float32.

    Args:
        clip: See `ClipReward`.
        processor: See `ClipReward`; None: where `clip` is.
        device: See `ModelReward`.
        dtype: See `ModelReward`.
        batch_size: See `ModelReward`.
    """

    name = "clip_score"
    range = (-1.0, 1.0)

    def __init__(
        self,
        *,
        clip: str | Path = "openai/clip-vit-large-patch14",
        processor: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        super().__init__(clip=clip, processor=processor or clip, device=device, dtype=dtype, batch_size=batch_size)

    @override
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> RewardOutput:
        return RewardOutput(self.cosines(images, prompts))


class PickScore(ClipReward):
    """exp(s)·cos(e_image, e_text), s the checkpoint's `logit_scale` (exp(s) ≤ 100); 20 to 24 for good images.

    The difference of two images' scores is the logit of the probability that people prefer the first. CLIP-H has 986 M
    parameters, 3.9 GB in float32.

    Source: Kirstain et al., 2023, equation 1, https://arxiv.org/abs/2305.01569; the model card of
    yuvalkirstain/PickScore_v1.

    Args:
        clip: See `ClipReward`.
        processor: See `ClipReward`.
        device: See `ModelReward`.
        dtype: See `ModelReward`.
        batch_size: See `ModelReward`.
    """

    name = "pick_score"
    unit = "logit"
    range = (-100.0, 100.0)

    def __init__(
        self,
        *,
        clip: str | Path = "yuvalkirstain/PickScore_v1",
        processor: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        super().__init__(clip=clip, processor=processor, device=device, dtype=dtype, batch_size=batch_size)

    @override
    def load(self) -> CLIPModel:
        clip = super().load()
        self.scale = float(clip.logit_scale.double().exp())  # before it is rounded: 1 % in bfloat16
        return clip

    @override
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> RewardOutput:
        cosines = self.cosines(images, prompts)
        return RewardOutput(self.scale * cosines)
