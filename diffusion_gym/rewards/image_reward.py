"""ImageReward on transformers' BLIP classes, and their names of its checkpoint's tensors."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from typing_extensions import override

from .affine_head import AffineHead
from .base import Metadata, RewardOutput
from .image_preparation import ImagePreparation
from .model_based import ModelReward, fetch_file, fill, pretrained, read_weights

CHECKPOINT = "ImageReward's checkpoint"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
HEAD_WIDTH = 64

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_VISION_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _vision_name(name: str) -> str:
    """Return transformers' name of a tensor of BLIP's image encoder."""
    if not name.startswith("blocks."):
        return _VISION.get(name, name)
    _, number, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return f"encoder.layers.{number}.{_VISION_LAYER.get(part, part)}.{kind}"


def from_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the checkpoint's tensors under the names of `BlipRewardModel`; the text encoder's are the same."""
    named = {}
    for name, tensor in weights.items():
        if name.startswith("blip.visual_encoder."):
            name = "vision." + _vision_name(name.removeprefix("blip.visual_encoder."))
        elif name.startswith("blip.text_encoder."):
            name = "text." + name.removeprefix("blip.text_encoder.")
        named[name] = tensor
    return named


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def vision_config(weights: Mapping[str, Tensor]) -> BlipVisionConfig:
    """Return the image encoder's configuration, by its tensors' shapes; attention heads are 64 wide."""
    patches, width = weights["vision.embeddings.position_embedding"].shape[1:]
    patch_size = weights["vision.embeddings.patch_embedding.weight"].shape[-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(weights, "vision.encoder.layers."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch_size * round((patches - 1) ** 0.5),
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )


def text_config(weights: Mapping[str, Tensor]) -> BlipTextConfig:
    """Return the text encoder's configuration, by its tensors' shapes; attention heads are 64 wide."""
    vocabulary, width = weights["text.embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["text.encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=weights["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers(weights, "text.encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=weights["text.embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        is_decoder=True,  # transformers' word for "has cross-attention"; it is called with is_decoder=False below
    )


class BlipRewardModel(nn.Module):
    """A BERT that reads the prompt and looks at the image in every layer, with a head on its first token's state."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = AffineHead(text.hidden_size)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the rewards [B], float32, of prepared images and tokenised prompts [B, L]."""
        image_states = self.vision(pixel_values=pixel_values).last_hidden_state
        states = self.text(
            input_ids, attention_mask=attention_mask, encoder_hidden_states=image_states, is_decoder=False
        ).last_hidden_state
        return (self.mlp(states[:, 0]) - MEAN) / STD


class ImageReward(ModelReward[BlipRewardModel]):
    """r = (head(h) − 0.167)/1.033, h the state of [CLS] in BLIP's text encoder that looks at the image.

    In standard deviations of the scores on the authors' data: mostly in [−2, 2], not bounded. TPDM's reward. BLIP
    ViT-L/16 at 224 pixels and BERT base with cross-attention have 446 M parameters, 1.8 GB in float32.

    Source: Xu et al., 2023, https://arxiv.org/abs/2304.05977; the package image-reward 1.5, `ImageReward.py`.

    Args:
        weights: The checkpoint `ImageReward.pt` (or its tensors as `.safetensors`): a file, or owner/name/file on the
            Hub. Sizes are taken from its tensors.
        tokenizer: BERT's, uncased: a folder, or an id on the Hub. Prompts are cut after 35 tokens.
        device: See `ModelReward`.
        dtype: See `ModelReward`; the head computes in float32 whatever it is.
        batch_size: See `ModelReward`.
    """

    name = "image_reward"
    unit = "standard deviation"

    def __init__(
        self,
        *,
        weights: str | Path = "THUDM/ImageReward/ImageReward.pt",
        tokenizer: str | Path = "google-bert/bert-base-uncased",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        self.weights = weights
        self.tokenizer = tokenizer

    @override
    def load(self) -> BlipRewardModel:
        weights = from_published(read_weights(self.weights, what=CHECKPOINT, keyword="weights"))
        try:
            network = BlipRewardModel(vision_config(weights), text_config(weights))
        except KeyError as error:
            raise ValueError(f"{self.weights} is not a checkpoint of ImageReward: it has no tensor {error}") from error
        fill(network, weights, self.weights)
        return network

    @override
    def make_ready(self) -> None:
        fetch_file(self.weights, what=CHECKPOINT, keyword="weights")
        self.load_rest()

    @cached_property
    def _tokenizer(self) -> BertTokenizer:
        return pretrained(BertTokenizer.from_pretrained, self.tokenizer, what="BERT's tokenizer", keyword="tokenizer")

    @override
    def load_rest(self) -> None:
        self._tokenizer  # noqa: B018

    @override
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> RewardOutput:
        side = self.network.vision.config.image_size
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(images.device)
        prepared = ImagePreparation(side, (side, side))(images)
        return RewardOutput(self.network(prepared, tokens.input_ids, tokens.attention_mask))
