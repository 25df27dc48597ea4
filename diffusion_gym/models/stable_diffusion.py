"""Stable Diffusion 1.x and 2.x, and every model in their layout: CLIP text encoder, KL autoencoder, UNet."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from typing_extensions import override

from ..loading import no_progress_bar
from .base import Conditioning, DiffusionModel, outside_inference_mode
from .folders import check_weights, empty_network, find_weights, read_config
from .lora import load_unet_lora, save_unet_lora
from .schedulers import discrete_schedule
from .understood import UNET, VAE, Values, check_components, check_values, component, is_count

_FEATURE_SIZE = 16
_DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
_COMPONENTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}


def _sample_size(unet: Mapping[str, Any], file: Path) -> int:
    """Return the latents' height and width that a UNet was trained on.

    Raises:
        ValueError: its configuration does not say, or they are not square.
    """
    size = unet["sample_size"]
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        return _sample_size({"sample_size": size[0]}, file)
    if not is_count(size):
        raise ValueError(
            f"{file}: sample_size must be a whole number of at least 1 (images are square), got {size!r}: give "
            "load_model or the environment image_size"
        )
    try:
        old = Version(Version(unet.get("_diffusers_version", "1")).base_version) < Version("0.9.0.dev0")
    except (InvalidVersion, TypeError) as error:
        raise ValueError(f"{file}: _diffusers_version must be a version, got {unet['_diffusers_version']!r}") from error
    return max(size, 64) if old else size


def _check_fit(unet: Any, vae: Any, text_encoder: CLIPTextModel, path: Path) -> None:
    """Check that the three networks fit each other.

    Raises:
        ValueError: they do not.
    """
    channels = {"in_channels": unet.config.in_channels, "out_channels": unet.config.out_channels}
    latent_channels = vae.config.latent_channels
    for key, value in channels.items():
        if value != latent_channels:
            raise ValueError(
                f"{path / 'unet' / 'config.json'}: {key} is {value}, the autoencoder's latents have {latent_channels} "
                "channels: not a text-to-image UNet (those for inpainting, depth or instructions are told more)"
            )
    width, asked = text_encoder.config.hidden_size, unet.config.cross_attention_dim
    if any(dim != width for dim in (asked if isinstance(asked, list | tuple) else [asked])):
        raise ValueError(
            f"{path / 'text_encoder' / 'config.json'}: hidden_size is {width}, but the UNet's cross_attention_dim "
            f"{asked}: they do not belong together"
        )


class StableDiffusionModel(DiffusionModel):
    """A `StableDiffusionPipeline` folder: Stable Diffusion 1.x, 2.x, their fine-tunes, and the embedded emoji model.

    It is read as diffusers' pipeline reads it, with the pipeline's own corrections of old folders: `steps_offset` is 1,
    `clip_sample` false, and the `sample_size` of UNets from before diffusers 0.9 at least 64. What is not understood
    is refused or warned about when the model is made; weights that are missing or do not fit are refused.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: `image_size` is no positive multiple of the autoencoder's scale factor, or the folder holds
            something that is not understood, or parts that do not fit each other, such as an epsilon-predicting UNet
            and a process whose last step has no signal (α = 0), where x̂_0 is not defined.
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
        variant: str | None,
    ) -> None:
        super().__init__(source, path, device=device, dtype=dtype, default_guidance_scale=default_guidance_scale)
        self._files: dict[str, tuple[Path, str | None]] = {}
        index = read_config(path / "model_index.json")
        check_components(index, _COMPONENTS, path / "model_index.json")
        unet = self._examined(UNet2DConditionModel, "unet", UNET, variant)
        vae = self._examined(AutoencoderKL, "vae", VAE, variant)
        text_encoder = self._examined_text_encoder(variant)
        _check_fit(unet, vae, text_encoder, path)
        _, scheduler = component(index, "scheduler", path / "model_index.json")
        self.schedule, self.prediction_type = discrete_schedule(
            path / "scheduler", class_name=scheduler, steps_offset=1
        )
        self._token_limit = self._examined_tokenizer(text_encoder.config)
        self._set_shapes(unet, 2 ** (len(vae.config.block_out_channels) - 1), image_size)

    def _set_shapes(self, unet: Any, scale_factor: int, image_size: int | None) -> None:
        if image_size is None:
            image_size = _sample_size(unet.config, self.path / "unet" / "config.json") * scale_factor
        if isinstance(image_size, bool) or not isinstance(image_size, Integral):
            shape = " (images are square: give one number)" if isinstance(image_size, Sequence) else ""
            raise ValueError(f"image_size must be a whole number{shape}, got {image_size!r}")
        if image_size < 1 or image_size % scale_factor:
            raise ValueError(
                f"image_size must be a multiple of {scale_factor} above 0 for {self.source!r}, got {image_size!r}"
            )
        size = int(image_size) // scale_factor
        self.image_shape = (3, int(image_size), int(image_size))
        self.latent_shape = (unet.config.in_channels, size, size)
        side = min(size, _FEATURE_SIZE)
        self.feature_shape = (unet.conv_in.out_channels + unet.conv_norm_out.num_channels, side, side)
        self.time_embedding_size = unet.time_embedding.linear_2.out_features

    def _examined(
        self, network: type[ModelMixin], name: str, understood: Mapping[str, Values], variant: str | None
    ) -> Any:
        """Return a network without its weights, after a check of its configuration and of its file of weights."""
        file = self.path / name / "config.json"
        config = read_config(file)
        check_values(config, network, understood, file)
        empty = empty_network(lambda: network.from_config(config), file)
        self._files[name] = find_weights(file.parent, "diffusion_pytorch_model", variant)
        check_weights(empty, self._files[name][0])
        return empty

    def _examined_text_encoder(self, variant: str | None) -> CLIPTextModel:
        file = self.path / "text_encoder" / "config.json"
        config = read_config(file)
        empty = empty_network(lambda: CLIPTextModel(CLIPTextConfig.from_dict(config)), file)
        self._files["text_encoder"] = find_weights(file.parent, "model", variant)
        check_weights(empty, self._files["text_encoder"][0], prefix="text_model.")
        return empty

    def _examined_tokenizer(self, text_encoder: CLIPTextConfig) -> int:
        """Return the most tokens of a prompt that the text encoder is given, after a check of the tokenizer."""
        folder = self.path / "tokenizer"
        if not (folder / "tokenizer.json").is_file() and not all(
            (folder / name).is_file() for name in ("vocab.json", "merges.txt")
        ):
            raise FileNotFoundError(
                f"{folder} has no vocabulary: neither tokenizer.json, nor vocab.json and merges.txt"
            )
        vocabulary, limit = len(self._tokenizer), self._tokenizer.model_max_length
        if vocabulary > text_encoder.vocab_size:
            raise ValueError(
                f"{folder} knows {vocabulary} tokens, the text encoder {text_encoder.vocab_size} (vocab_size): they do "
                "not belong together"
            )
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 2:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: model_max_length must be a number above 2 (first and last token "
                f"are marks), got {limit!r}: {text_encoder.max_position_embeddings} is the text encoder's own"
            )
        return int(min(limit, text_encoder.max_position_embeddings))

    def _loaded(self, network: Any, name: str, dtype: torch.dtype) -> Any:
        file, variant = self._files[name]
        options = {_DTYPE: torch.float32, "trust_remote_code": False} if name == "text_encoder" else {}
        with outside_inference_mode(), no_progress_bar():
            loaded = network.from_pretrained(
                self.path, subfolder=name, variant=variant, use_safetensors=".safetensors" in file.name, **options
            )
            return self._frozen(loaded, dtype)

    @cached_property
    def denoiser(self) -> nn.Module:
        """The frozen UNet."""
        return self._loaded(UNet2DConditionModel, "unet", self.dtype)

    @cached_property
    def _vae(self) -> AutoencoderKL:
        return self._loaded(AutoencoderKL, "vae", torch.float32)

    @cached_property
    def _tokenizer(self) -> CLIPTokenizer:
        try:
            return CLIPTokenizer.from_pretrained(self.path, subfolder="tokenizer", trust_remote_code=False)
        except Exception as error:  # whatever the library stumbles over: the folder is the only input
            raise ValueError(
                f"{self.path / 'tokenizer'} holds no tokenizer that can be read ({type(error).__name__}: {error}): "
                "restore the files that came with the model"
            ) from error

    @cached_property
    def _text_encoder(self) -> CLIPTextModel:
        return self._loaded(CLIPTextModel, "text_encoder", torch.float32)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        limit = self._token_limit
        lengths = [len(ids) for ids in self._tokenizer(list(prompts), verbose=False).input_ids]
        cut = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit]
        if cut:
            warnings.warn(
                f"{len(cut)} prompts are longer than the {limit} tokens of the text encoder, which "
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
        # One by one, so that a prompt's embedding does not depend on which others are asked for with it.
        embeds = [
            self._text_encoder(ids[row : row + 1], attention_mask=mask[row : row + 1] if masked else None)[0]
            for row in range(len(ids))
        ]
        return {"prompt_embeds": torch.cat(embeds)}

    def _model_output(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        dtype = next(network.parameters()).dtype
        embeds = conditioning["prompt_embeds"].to(dtype)
        return network(latents.to(dtype), t, encoder_hidden_states=embeds, return_dict=False)[0]

    def _model_features(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            return lambda module, args, output: seen.update({name: output})

        layers = ("conv_in", "conv_norm_out", "time_embedding")
        hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
        try:
            output = self._model_output(network, latents, t, conditioning, guidance_scale)
        finally:
            for hook in hooks:
                hook.remove()
        return output, torch.cat([seen["conv_in"], seen["conv_norm_out"]], dim=1), seen["time_embedding"]

    def _decode(self, latents: Tensor) -> Tensor:
        images = self._vae.decode(latents / self._vae.config.scaling_factor, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)

    def use_training_attention(self, network: nn.Module, *, bf16: bool) -> None:
        """Choose attention in plain operations for bf16 on CPUs."""
        if self.device.type == "cpu" and bf16:
            # The fused attention's bf16 backward on CPUs took a third of a training step: 1.17 s against 0.93 s.
            network.set_attn_processor(AttnProcessor())  # type: ignore[operator]

    @torch.no_grad()
    @override
    def encode(self, images: Tensor) -> Tensor:
        posterior = self._vae.encode(images.float() * 2 - 1).latent_dist
        return posterior.mode() * self._vae.config.scaling_factor

    @override
    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        save_unet_lora(denoiser, folder)

    @override
    def load_lora(self, denoiser: nn.Module, folder: Path) -> None:
        load_unet_lora(denoiser, folder)
