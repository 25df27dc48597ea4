"""Flux: CLIP and T5 text encoders, KL autoencoder, transformer over latents that are packed two by two."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from torch import Tensor, nn

from ..schedules import as_float
from .base import Conditioning, ImageSize
from .stable_diffusion_3 import TransformerModel
from .text_encoders import TextEncoder, stacked
from .understood import FLUX

_T5_TOKENS = 512
_DEFAULT_SIZE = 128  # latents in height and width, which no file of the folder says
_PIPELINES_TIMES = 1000  # of which it gives the network a share, whatever the scheduler's number is


class FluxModel(TransformerModel):
    """A `FluxPipeline` folder: Flux.1 [dev], [schnell], and their fine-tunes.

    It is read as diffusers' pipeline reads it, with T5's 512 tokens. [dev] is told the guidance scale (`guidance` is
    "embedded"); [schnell] was distilled for one, and for 1 to 4 steps ("none").

    Latents are [C, H/8, W/8] as the autoencoder has them; the network takes and returns them packed, [HW/16², 4C].

    Source: Black Forest Labs, 2024, https://github.com/black-forest-labs/flux.
    """

    components: ClassVar = {
        "transformer": ("FluxTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
    }
    network = FluxTransformer2DModel
    feature_layers = ("x_embedder", "norm_out", "time_text_embed")
    lora_loader = FluxLoraLoaderMixin
    default_guidance_scale = 3.5
    patch = 2

    def _examine(self, image_size: ImageSize | None) -> None:
        file = self.path / "transformer" / "config.json"
        transformer = self._examined(FluxTransformer2DModel, "transformer", FLUX)
        axes, head = transformer.config.axes_dims_rope, transformer.config.attention_head_dim
        if sum(axes) != head:
            raise ValueError(f"{file}: axes_dims_rope {list(axes)} must sum to attention_head_dim, {head}")
        channels = {
            "in_channels / 4": transformer.config.in_channels / self.patch**2,
            "out_channels / 4": transformer.out_channels / self.patch**2,
        }
        self._examine_latents(transformer, channels, image_size, default_size=_DEFAULT_SIZE)
        self._examine_flow(is_even=True)
        self.guidance = "embedded" if transformer.config.guidance_embeds else "none"
        self.default_guidance_scale = 3.5 if self.guidance == "embedded" else 1.0
        self._text = TextEncoder(self.path, variant=self.variant)
        self._check_width(transformer, "pooled_projection_dim", self._text.config.hidden_size, self._text)
        self._text_2 = self._examined_t5(transformer, "text_encoder_2", limit=_T5_TOKENS)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        pooled = self._text.outputs(self._text_encoder, prompts)
        hidden = self._text_2.outputs(self._text_encoder_2, prompts)
        return {
            "prompt_embeds": stacked(output["last_hidden_state"] for output in hidden),
            "pooled_prompt_embeds": stacked(output["pooler_output"] for output in pooled),
        }

    def _model_output(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        dtype = next(network.parameters()).dtype
        embeds = conditioning["prompt_embeds"].to(dtype)
        time = as_float(t)
        axes = [torch.arange(size, device=latents.device, dtype=torch.float32) for size in (1, *self._map_size)]
        output = network(
            hidden_states=F.pixel_unshuffle(latents.to(dtype), self.patch).flatten(2).transpose(1, 2),
            timestep=time * (self.schedule.num_train_timesteps / _PIPELINES_TIMES),
            guidance=torch.full_like(time, guidance_scale) if self.guidance == "embedded" else None,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=embeds,
            txt_ids=axes[0].new_zeros(embeds.shape[1], len(axes)),
            img_ids=torch.cartesian_prod(*axes),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(self._as_map(output), self.patch)
