"""Stable Diffusion 1.x and 2.x, and every model in their layout: CLIP text encoder, KL autoencoder, UNet."""

import json
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..loading import no_progress_bar
from .base import Conditioning, DiffusionModel
from .lora import load_unet_lora, save_unet_lora
from .schedulers import discrete_schedule

_FEATURE_SIZE = 16


class StableDiffusionModel(DiffusionModel):
    """A `StableDiffusionPipeline` folder: Stable Diffusion 1.x, 2.x, their fine-tunes, and the embedded emoji model.

    Raises:
        ValueError: `image_size` is no positive multiple of the autoencoder's scale factor, or an epsilon-predicting
            model is paired with a process whose last step has no signal (α = 0), where x̂_0 is not defined.
    """

    denoiser_folder = "unet"
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    default_guidance_scale = 5.0

    def __init__(
        self,
        source: str,
        path: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        image_size: int | None,
        default_guidance_scale: float,
    ) -> None:
        super().__init__(source, path, device=device, dtype=dtype, default_guidance_scale=default_guidance_scale)
        unet = json.loads((path / "unet" / "config.json").read_text())
        vae = json.loads((path / "vae" / "config.json").read_text())
        scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
        image_size = unet["sample_size"] * scale_factor if image_size is None else image_size
        if not isinstance(image_size, int) or image_size < 1 or image_size % scale_factor:
            raise ValueError(
                f"image_size must be a multiple of {scale_factor} above 0 for {source!r}, got {image_size!r}"
            )
        self.image_shape = (3, image_size, image_size)
        self.latent_shape = (unet["in_channels"], image_size // scale_factor, image_size // scale_factor)
        _, *size = self.latent_shape
        self.feature_shape = (
            2 * unet["block_out_channels"][0],
            min(size[0], _FEATURE_SIZE),
            min(size[1], _FEATURE_SIZE),
        )
        self.time_embedding_size = unet.get("time_embedding_dim") or 4 * unet["block_out_channels"][0]
        self.schedule = discrete_schedule(path / "scheduler")
        scheduler = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
        self.prediction_type = scheduler.get("prediction_type", "epsilon")
        if self.prediction_type == "epsilon" and self.schedule.alphas_cumprod[-1] == 0:
            raise ValueError(f"{path}: a zero-SNR schedule needs v_prediction or sample prediction, not epsilon")

    @cached_property
    def denoiser(self) -> nn.Module:
        """The frozen UNet."""
        unet = UNet2DConditionModel.from_pretrained(self.path, subfolder="unet")
        return nn.Module.to(unet, self.device, self.dtype).eval().requires_grad_(False)

    @cached_property
    def _vae(self) -> AutoencoderKL:
        vae = AutoencoderKL.from_pretrained(self.path, subfolder="vae")
        return nn.Module.to(vae, self.device, torch.float32).eval().requires_grad_(False)

    @cached_property
    def _tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.path, subfolder="tokenizer")

    @cached_property
    def _text_encoder(self) -> CLIPTextModel:
        with no_progress_bar():
            encoder = CLIPTextModel.from_pretrained(self.path, subfolder="text_encoder")
        return encoder.to(self.device, torch.float32).eval().requires_grad_(False)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        limit = self._tokenizer.model_max_length
        lengths = [len(ids) for ids in self._tokenizer(list(prompts), verbose=False).input_ids]
        cut = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit]
        if cut:
            warnings.warn(
                f"{len(cut)} of {len(prompts)} prompts are longer than the {limit} tokens of the text encoder, which "
                f"does not see what is beyond, so that long prompts may look alike: {cut[0]!r} is the first",
                stacklevel=2,
            )
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            max_length=limit,
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        masked = getattr(self._text_encoder.config, "use_attention_mask", False)
        embeds = [
            self._text_encoder(ids[part], attention_mask=mask[part] if masked else None)[0]
            for part in (slice(start, start + 64) for start in range(0, len(ids), 64))
        ]
        return {"prompt_embeds": torch.cat(embeds)}

    def _model_output(self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = next(network.parameters()).dtype
        embeds = conditioning["prompt_embeds"].to(dtype)
        return network(latents.to(dtype), t, encoder_hidden_states=embeds, return_dict=False)[0]

    def _model_features(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            return lambda module, args, output: seen.update({name: output})

        layers = ("conv_in", "conv_norm_out", "time_embedding")
        hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
        try:
            output = self._model_output(network, latents, t, conditioning)
        finally:
            for hook in hooks:
                hook.remove()
        return output, torch.cat([seen["conv_in"], seen["conv_norm_out"]], dim=1), seen["time_embedding"]

    def _decode(self, latents: Tensor) -> Tensor:
        images = self._vae.decode(latents / self._vae.config.scaling_factor, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:  # noqa: D102
        posterior = self._vae.encode(images.float() * 2 - 1).latent_dist
        return posterior.mode() * self._vae.config.scaling_factor

    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:  # noqa: D102
        save_unet_lora(denoiser, folder)

    def load_lora(self, denoiser: nn.Module, folder: Path) -> None:  # noqa: D102
        load_unet_lora(denoiser, folder)
