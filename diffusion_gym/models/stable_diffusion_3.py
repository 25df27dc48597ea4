"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, KL autoencoder, transformer over patches of latents."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin, SD3LoraLoaderMixin
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast
from typing_extensions import override

from ..schedules import FlowSchedule, as_float
from .base import Conditioning, ImageSize
from .lora import load_transformer_lora, save_transformer_lora
from .pipeline import PipelineModel
from .schedulers import flow_schedule
from .text_encoders import TextEncoder, stacked
from .understood import SHIFTED_VAE, check_components, is_count

_T5 = "text_encoder_3"
_T5_COMPONENTS = {_T5: ("T5EncoderModel",), "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast")}
_T5_TOKENS = "_max_sequence_length"
_MOST_T5_TOKENS = 512


class TransformerModel(PipelineModel):
    """What the families with a transformer share: a rectified flow, features that are tokens, and LoRA files.

    Attributes:
        patch: The latents in height and width that are one token.
        lora_loader: The part of the pipeline that writes and reads LoRA files.
    """

    schedule: FlowSchedule
    prediction_type = "flow"
    denoiser_folder = "transformer"
    lora_targets = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    patch: int
    lora_loader: ClassVar[type[SD3LoraLoaderMixin] | type[FluxLoraLoaderMixin]]

    @property
    def _map_size(self) -> tuple[int, int]:
        """Height and width of the image in tokens."""
        return self.latent_shape[1] // self.patch, self.latent_shape[2] // self.patch

    def _examine_latents(
        self, transformer: Any, channels: Mapping[str, float], image_size: ImageSize | None, *, default_size: int
    ) -> None:
        """Check the autoencoder, and set all shapes.

        Args:
            transformer: The transformer without its weights.
            channels: Its numbers of channels, as of latents, by their keys.
            image_size: In pixels; None: that of `default_size`.
            default_size: Latents in height and width.
        """
        file = self.path / self.denoiser_folder / "config.json"
        vae = self._examined_vae(channels, file, understood=SHIFTED_VAE)
        self._latent_shift = vae.config.shift_factor
        self._set_shapes(
            default_size * self.scale_factor if image_size is None else image_size,
            channels=vae.config.latent_channels,
            patch=self.patch,
            features=2 * transformer.inner_dim,
            time_embedding=transformer.inner_dim,
        )

    def _examine_flow(self, *, is_even: bool = False) -> None:
        """Set the schedule for the image's size; `is_even` is of `flow_schedule`."""
        height, width = self._map_size
        self.schedule = flow_schedule(
            self.path / "scheduler", class_name=self._scheduler_class(), tokens=height * width, is_even=is_even
        )

    def _check_width(
        self, transformer: Any, key: str, width: int, *encoders: TextEncoder, is_most: bool = False
    ) -> None:
        """Raise ValueError unless the transformer takes texts of this width, or of at most this one."""
        expected = transformer.config[key]
        if width != expected and not (is_most and width < expected):
            files = " and ".join(str(self.path / encoder.name / "config.json") for encoder in encoders)
            raise ValueError(
                f"{files}: the embeddings' width is {width}, but the transformer's {key} {expected}: they do not "
                "belong together"
            )

    def _examined_t5(self, transformer: Any, name: str, *, limit: int) -> TextEncoder:
        """Return a T5 in a subfolder that reads `limit` tokens, once it fits the transformer."""
        t5 = TextEncoder(
            self.path,
            name,
            variant=self.variant,
            network=T5EncoderModel,
            config=T5Config,
            tokenizer=T5TokenizerFast,
            limit=limit,
        )
        self._check_width(transformer, "joint_attention_dim", t5.config.d_model, t5)
        return t5

    @override
    def _as_map(self, hidden: Tensor) -> Tensor:
        return hidden.transpose(1, 2).unflatten(2, self._map_size)

    @override
    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        save_transformer_lora(denoiser, folder, self.lora_loader)

    @override
    def load_lora(self, denoiser: nn.Module, folder: Path) -> None:
        load_transformer_lora(denoiser, folder)


class StableDiffusion3Model(TransformerModel):
    """A `StableDiffusion3Pipeline` folder: Stable Diffusion 3, 3.5, and their fine-tunes.

    It is read as diffusers' pipeline reads it. T5 may be missing (null in `model_index.json`), or be left out by
    `load_model(…, without=("text_encoder_3",))`: zeros stand for its embeddings. They are 256 tokens, or as many as
    the key `_max_sequence_length` in `model_index.json` says, which diffusers passes over.

    Source: Esser et al., 2024, https://arxiv.org/abs/2403.03206.
    """

    components: ClassVar = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    optional_parts = (_T5,)
    network = SD3Transformer2DModel
    feature_layers = ("pos_embed", "norm_out", "time_text_embed")
    lora_loader = SD3LoraLoaderMixin
    default_guidance_scale = 7.0

    def _examine(self, image_size: ImageSize | None) -> None:
        transformer = self._examine_transformer(image_size)
        self._examine_flow()
        self._text, self._text_2 = self._examined_clips(transformer)
        self._t5_tokens = self._index.get(_T5_TOKENS, 256)
        if not is_count(self._t5_tokens, minimum=0) or self._t5_tokens > _MOST_T5_TOKENS:
            raise ValueError(
                f"{self.path / 'model_index.json'}: {_T5_TOKENS} must be a whole number from 0 to {_MOST_T5_TOKENS}, "
                f"got {self._t5_tokens!r}"
            )
        self._t5_width: int = transformer.config.joint_attention_dim
        self._text_3 = None
        if self._has_t5():
            check_components(self._index, _T5_COMPONENTS, self.path / "model_index.json")
            self._text_3 = self._examined_t5(transformer, _T5, limit=self._t5_tokens)

    def _examine_transformer(self, image_size: ImageSize | None) -> Any:
        """Check the transformer and the autoencoder, and set all shapes; return the transformer without its weights."""
        transformer = self._examined(SD3Transformer2DModel, "transformer", {})
        channels = {"in_channels": transformer.config.in_channels, "out_channels": transformer.out_channels}
        self.patch = transformer.config.patch_size
        self._examine_latents(transformer, channels, image_size, default_size=transformer.config.sample_size)
        most = transformer.config.pos_embed_max_size
        if most is not None and max(self._map_size) > most:
            raise ValueError(
                f"image_size must be at most {most * self.patch * self.scale_factor} in height and width for "
                f"{self.source!r} (pos_embed_max_size), got {self.image_size}"
            )
        return transformer

    def _examined_clips(self, transformer: Any) -> tuple[TextEncoder, TextEncoder]:
        """Return the two CLIP text encoders, whose prompts the pipeline cuts to the length of the first."""
        first = TextEncoder(self.path, variant=self.variant, network=CLIPTextModelWithProjection)
        second = TextEncoder(
            self.path, "text_encoder_2", variant=self.variant, network=CLIPTextModelWithProjection, limit=first.limit
        )
        if first.limit != second.limit:
            raise ValueError(
                f"{self.path}: text_encoder takes {first.limit} tokens and text_encoder_2 {second.limit}: they do not "
                "belong together"
            )
        both = (first, second)
        width = sum(encoder.config.hidden_size for encoder in both)
        self._check_width(transformer, "joint_attention_dim", width, *both, is_most=True)
        pooled = sum(encoder.config.projection_dim for encoder in both)
        self._check_width(transformer, "pooled_projection_dim", pooled, *both)
        return both

    def _has_t5(self) -> bool:
        """Whether there is a T5 that is not left out, and has tokens to read."""
        is_null = all(self._index.get(name) in (None, [None, None]) for name in _T5_COMPONENTS)
        return not is_null and _T5 not in self.without and self._t5_tokens > 0

    @cached_property
    def _text_encoder_3(self) -> nn.Module:
        assert self._text_3 is not None
        return self._loaded_text_encoder(self._text_3)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        hidden, pooled = self._text.hidden_and_pooled(self._text_encoder, prompts)
        hidden_2, pooled_2 = self._text_2.hidden_and_pooled(self._text_encoder_2, prompts)
        clips = torch.cat([hidden, hidden_2], dim=2)
        if self._text_3 is None:
            t5 = clips.new_zeros(len(prompts), self._t5_tokens, self._t5_width)
        else:
            outputs = self._text_3.outputs(self._text_encoder_3, prompts)
            t5 = stacked(output["last_hidden_state"] for output in outputs)
        clips = F.pad(clips, (0, self._t5_width - clips.shape[2]))
        return {
            "prompt_embeds": torch.cat([clips, t5], dim=1),
            "pooled_prompt_embeds": torch.cat([pooled, pooled_2], dim=1),
        }

    def _model_output(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        dtype = next(network.parameters()).dtype
        return network(
            hidden_states=latents.to(dtype),
            timestep=as_float(t) * self.schedule.num_train_timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]
