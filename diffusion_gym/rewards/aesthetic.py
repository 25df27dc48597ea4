"""LAION's aesthetic predictor: DDPO's second task."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel
from typing_extensions import override

from .affine_head import AffineHead
from .base import Metadata, RewardOutput
from .image_preparation import ImagePreparation
from .model_based import ModelReward, fetch_file, fetch_model, fill, pretrained, read_weights

HEAD, CLIP = "the head of LAION's aesthetic predictor", "CLIP ViT-L/14"
PUBLISHED = "sac+logos+ava1-l14-linearMSE.pth"
PUBLISHED_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


class AestheticPredictor(nn.Module):
    """An affine function of CLIP's image embedding at length 1.

    Args:
        clip: The CLIP model, of which the image half is kept.
        head: The affine function.
    """

    def __init__(self, clip: CLIPModel, head: AffineHead) -> None:
        super().__init__()
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.head = head

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the ratings [B], float32, of prepared images."""
        embeds = self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output)
        return self.head(F.normalize(embeds.float(), dim=-1))


class Aesthetic(ModelReward[AestheticPredictor]):
    """LAION's prediction of people's ratings, from 1 to 10: r = head(e/‖e‖), e = CLIP's image embedding.

    The scale is what people were asked for, not a bound: the head is affine in a point of the unit sphere. Images of
    Stable Diffusion lie near 5.5; the prompt is not looked at. CLIP ViT-L/14's image half has 304 M parameters, 1.2 GB
    in float32.

    Source: Schuhmann et al., 2022, https://github.com/christophschuhmann/improved-aesthetic-predictor; as in
    ddpo-pytorch, `aesthetic_scorer.py`.

    Args:
        clip: CLIP ViT-L/14: a folder, or an id on the Hub.
        head: The head's weights (`layers.0.weight`, …): a `.safetensors` or `.pth` file, or owner/name/file on the Hub.
        head_sha256: The SHA-256 that the file must have. None: that of the published file where `head` has its name
            (the hash is the one that public code pins for it), and no check otherwise.
        device: See `ModelReward`.
        dtype: See `ModelReward`; the head computes in float32 whatever it is.
        batch_size: See `ModelReward`.
    """

    name = "aesthetic"
    unit = "rating"

    def __init__(
        self,
        *,
        clip: str | Path = "openai/clip-vit-large-patch14",
        head: str | Path = f"camenduru/improved-aesthetic-predictor/{PUBLISHED}",
        head_sha256: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        self.clip = clip
        self.head = head
        self.head_sha256 = head_sha256 or (PUBLISHED_SHA256 if Path(head).name == PUBLISHED else None)

    @override
    def load(self) -> AestheticPredictor:
        weights = read_weights(self.head, what=HEAD, keyword="head", sha256=self.head_sha256)
        clip = pretrained(CLIPModel.from_pretrained, self.clip, what=CLIP, keyword="clip")
        head = AffineHead(clip.config.projection_dim)
        fill(head, weights, self.head)
        return AestheticPredictor(clip, head)

    @override
    def make_ready(self) -> None:
        fetch_file(self.head, what=HEAD, keyword="head")
        fetch_model(self.clip, what=CLIP, keyword="clip")
        self.load_rest()

    @cached_property
    def _prepare(self) -> ImagePreparation:
        return pretrained(ImagePreparation.load, self.clip, what="CLIP's preprocessor_config.json", keyword="clip")

    @override
    def load_rest(self) -> None:
        self._prepare  # noqa: B018

    @override
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> RewardOutput:
        return RewardOutput(self.network(self._prepare(images)))
