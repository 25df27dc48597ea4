"""Stable Diffusion 1.x and 2.x, and every model in their layout: CLIP text encoder, KL autoencoder, UNet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn
from typing_extensions import override

from .base import Conditioning, ImageSize
from .lora import load_unet_lora, save_unet_lora
from .pipeline import PipelineModel
from .schedulers import discrete_schedule
from .text_encoders import TextEncoder, stacked
from .understood import UNET, VAE, Values, is_count


def sample_size(unet: Mapping[str, Any], file: Path) -> tuple[int, int]:
    """Return the latents' height and width that a UNet was trained on, as diffusers' pipelines read it.

    Raises:
        ValueError: its configuration does not say.
    """
    size = unet["sample_size"]
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(is_count(side) for side in sides):
        raise ValueError(
            f"{file}: sample_size must be a whole number of at least 1, or two, got {size!r}: give "
            "load_model or the environment image_size"
        )
    try:
        old = Version(Version(unet.get("_diffusers_version", "1")).base_version) < Version("0.9.0.dev0")
    except (InvalidVersion, TypeError) as error:
        raise ValueError(f"{file}: _diffusers_version must be a version, got {unet['_diffusers_version']!r}") from error
    height, width = (max(side, 64) if old and not isinstance(size, list | tuple) else side for side in sides)
    return height, width


class UNetModel(PipelineModel):
    """What the families with a UNet share: its features, its attention on CPUs and its LoRA files."""

    network = UNet2DConditionModel
    denoiser_folder = "unet"
    feature_layers = ("conv_in", "conv_norm_out", "time_embedding")
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")

    def _examine_unet(
        self, understood: Mapping[str, Values], image_size: ImageSize | None, *, vae: Mapping[str, Values] = VAE
    ) -> Any:
        """Check the UNet and the autoencoder, and set all shapes; return the UNet without its weights."""
        file = self.path / "unet" / "config.json"
        unet = self._examined(UNet2DConditionModel, "unet", understood)
        self._examined_vae({key: unet.config[key] for key in ("in_channels", "out_channels")}, file, understood=vae)
        if image_size is None:
            height, width = sample_size(unet.config, file)
            image_size = (height * self.scale_factor, width * self.scale_factor)
        self._set_shapes(
            image_size,
            channels=unet.config.in_channels,
            features=unet.conv_in.out_channels + unet.conv_norm_out.num_channels,
            time_embedding=unet.time_embedding.linear_2.out_features,
        )
        return unet

    def _check_text_width(self, unet: Any, *encoders: TextEncoder) -> None:
        """Raise ValueError unless the UNet attends to embeddings as wide as the text encoders' together."""
        widths = [encoder.config.hidden_size for encoder in encoders]
        asked = unet.config.cross_attention_dim
        if any(dim != sum(widths) for dim in (asked if isinstance(asked, list | tuple) else [asked])):
            files = " and ".join(str(self.path / encoder.name / "config.json") for encoder in encoders)
            raise ValueError(
                f"{files}: hidden_size is {' + '.join(map(str, widths))}, but the UNet's cross_attention_dim {asked}: "
                "they do not belong together"
            )

    def use_training_attention(self, network: nn.Module, *, bf16: bool) -> None:
        """Choose attention in plain operations for bf16 on CPUs."""
        if self.device.type == "cpu" and bf16:
            # The fused attention's bf16 backward on CPUs took a third of a training step: 1.17 s against 0.93 s.
            network.set_attn_processor(AttnProcessor())  # type: ignore[operator]

    @override
    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        save_unet_lora(denoiser, folder)

    @override
    def load_lora(self, denoiser: nn.Module, folder: Path) -> None:
        load_unet_lora(denoiser, folder)


class StableDiffusionModel(UNetModel):
    """A `StableDiffusionPipeline` folder: Stable Diffusion 1.x, 2.x, their fine-tunes, and the embedded emoji model.

    It is read as diffusers' pipeline reads it, with the pipeline's own corrections of old folders: `steps_offset` is 1,
    `clip_sample` false, and the `sample_size` of UNets from before diffusers 0.9 at least 64. An epsilon-predicting
    UNet and a process whose last step has no signal (α = 0), where x̂_0 is not defined, do not fit each other.
    """

    components: ClassVar = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    default_guidance_scale = 5.0

    def _examine(self, image_size: ImageSize | None) -> None:
        self._examine_networks(UNET, image_size)
        self.schedule, self.prediction_type = discrete_schedule(
            self.path / "scheduler", class_name=self._scheduler_class(), steps_offset=1
        )

    def _examine_networks(self, understood: Mapping[str, Values], image_size: ImageSize | None) -> Any:
        """Check the UNet, the autoencoder and the text encoder; return the UNet without its weights."""
        unet = self._examine_unet(understood, image_size)
        self._text = TextEncoder(self.path, variant=self.variant)
        self._check_text_width(unet, self._text)
        return unet

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        outputs = self._text.outputs(self._text_encoder, prompts)
        return {"prompt_embeds": stacked(output["last_hidden_state"] for output in outputs)}

    def _model_output(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        dtype = next(network.parameters()).dtype
        embeds = conditioning["prompt_embeds"].to(dtype)
        return network(latents.to(dtype), t, encoder_hidden_states=embeds, return_dict=False)[0]
