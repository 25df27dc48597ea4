"""Human Preference Score v2.1, and transformers' names of OpenCLIP's tensors."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel
from typing_extensions import override

from .base import Metadata, RewardOutput
from .clip import ClipReward
from .image_preparation import resize, to_levels
from .model_based import fetch_file, fill, pretrained, read_weights

CHECKPOINT = "the checkpoint of HPSv2"

_TOP = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_STACKS = {
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an OpenCLIP checkpoint's tensors under the names of transformers' `CLIPModel`; others are left out.

    The projections are transposed; the stacked projection of query, key and value is split into three.

    Source: open_clip `model.py` and `transformer.py`, https://github.com/mlfoundations/open_clip
    """
    named = {new: weights[old] for old, new in _TOP.items() if old in weights}
    named |= {new: weights[old].T for old, new in _TRANSPOSED.items() if old in weights}
    for old, tensor in weights.items():
        stack = next((prefix for prefix in _STACKS if old.startswith(prefix)), None)
        if stack is None:
            continue
        number, _, rest = old.removeprefix(stack).partition(".")
        layer = f"{_STACKS[stack]}{number}."
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = rest.removeprefix("attn.in_proj_")
            for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                named[f"{layer}self_attn.{projection}_proj.{kind}"] = part
        else:
            part_name, _, kind = rest.rpartition(".")
            if part_name in _LAYER:
                named[f"{layer}{_LAYER[part_name]}.{kind}"] = tensor
    return named


class HPSv2(ClipReward):
    """cos(e_image, e_text) of a CLIP-H that was trained on people's choices; in [−1, 1], 0.25 to 0.33 for good images.

    CLIP-H has 986 M parameters, 3.9 GB in float32.

    Source: Wu et al., 2023, https://arxiv.org/abs/2306.09341; `hpsv2/img_score.py`, version 1.2.0. As there, the longer
    side is resized to CLIP's (224) and the rest padded with black, without rounding to bytes.

    Note:
        There torchvision resizes a tensor, with antialiasing from torchvision 0.17 on and without before. Here it is
        always with: scores of the published code under an older torchvision differ.

    Args:
        weights: The checkpoint, in OpenCLIP's names: a file, or owner/name/file on the Hub.
        clip: The source of CLIP-H's `config.json`, tokenizer and `preprocessor_config.json`: a folder, or a Hub id.
            Its weights are not read.
        device: See `ModelReward`.
        dtype: See `ModelReward`.
        batch_size: See `ModelReward`.
    """

    name = "hps_v2"
    range = (-1.0, 1.0)

    def __init__(
        self,
        *,
        weights: str | Path = "xswu/HPSv2/HPS_v2.1_compressed.pt",
        clip: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        super().__init__(clip=clip, processor=clip, device=device, dtype=dtype, batch_size=batch_size)
        self.weights = weights

    @override
    def load(self) -> CLIPModel:
        weights = read_weights(self.weights, what=CHECKPOINT, keyword="weights")
        clip = CLIPModel(self._config)
        fill(clip, from_open_clip(weights), self.weights)
        return clip

    @override
    def make_ready(self) -> None:
        fetch_file(self.weights, what=CHECKPOINT, keyword="weights")
        self._config  # noqa: B018
        self.load_rest()

    @cached_property
    def _config(self) -> CLIPConfig:
        return pretrained(CLIPConfig.from_pretrained, self.clip, what="CLIP-H's config.json", keyword="clip")

    def prepare(self, images: Tensor) -> Tensor:
        """Return images [B, 3, H, W] in [0, 1] as HPSv2's inputs: whole, on a black square."""
        side = self._prepare.size
        scale = side / max(images.shape[-2:])
        height, width = (round(length * scale) for length in images.shape[-2:])
        images = resize(to_levels(images) / 255, height, width)
        top, left = (side - height) // 2, (side - width) // 2
        return self._prepare.normalise(F.pad(images, (left, side - width - left, top, side - height - top)))

    @override
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> RewardOutput:
        return RewardOutput(self.cosines(images, prompts))
