"""What all families of diffusers' latent diffusion pipelines share.

A family is a subclass in a file of its own: it says which parts its folder must have and what it does not understand of
them, how prompts are encoded, and how its network is called.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from diffusers import AutoencoderKL, ModelMixin
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from ..loading import no_progress_bar
from .base import Conditioning, DiffusionModel, ImageSize, Origin, as_image_size, outside_inference_mode
from .folders import check_weights, empty_network, find_weights, read_config
from .offloading import lent
from .text_encoders import TextEncoder
from .understood import VAE, Values, check_components, check_values, component

_FEATURE_SIZE = 16
_DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


class PipelineModel(DiffusionModel):
    """A folder of one of diffusers' pipelines: an autoencoder, text encoders and a denoiser of latents.

    Whatever a folder holds is examined when the model is made, without reading weights; the networks are loaded when
    they are first needed. What is not understood is refused or warned about; weights that are missing or do not fit are
    refused.

    Attributes:
        components: The classes that each part of the folder may be of.
        network: The denoiser's class.
        feature_layers: The names of the first and the last hidden layer, and of the layer that embeds the time.
        scale_factor: Pixels of an image to each latent, in height and width.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: `image_size` is not a multiple of what the networks need, or the folder holds something that is not
            understood, or parts that do not fit each other.
    """

    has_text_encoders = True
    components: ClassVar[Mapping[str, tuple[str, ...]]]
    network: ClassVar[type[ModelMixin]]
    feature_layers: ClassVar[tuple[str, str, str]]
    scale_factor: int
    _latent_shift: float = 0.0
    _text: TextEncoder
    _text_2: TextEncoder  # of the families that have two

    def __init__(self, origin: Origin) -> None:
        super().__init__(origin)
        self._files: dict[str, tuple[Path, str | None]] = {}
        self._index = read_config(self.path / "model_index.json")
        check_components(self._index, self.components, self.path / "model_index.json")
        self._examine(origin.image_size)

    @abstractmethod
    def _examine(self, image_size: ImageSize | None) -> None:
        """Check the folder's parts, and set what they say: the schedule, the prediction type and all shapes."""

    def _scheduler_class(self) -> str:
        """Return the name of the scheduler's class that `model_index.json` gives."""
        return component(self._index, "scheduler", self.path / "model_index.json")[1]

    def _examined(self, network: type[ModelMixin], name: str, understood: Mapping[str, Values]) -> Any:
        """Return a network without its weights, after a check of its configuration and of its file of weights."""
        file = self.path / name / "config.json"
        config = read_config(file)
        check_values(config, network, understood, file)
        empty = empty_network(lambda: network.from_config(config), file)
        self._files[name] = find_weights(file.parent, "diffusion_pytorch_model", self.variant)
        check_weights(empty, self._files[name][0])
        return empty

    def _examined_vae(
        self, latent_channels: Mapping[str, float], config: Path, *, understood: Mapping[str, Values] = VAE
    ) -> Any:
        """Return the autoencoder without its weights, after a check that the denoiser takes and returns its latents.

        Args:
            latent_channels: The denoiser's numbers of channels, by their keys.
            config: The denoiser's configuration, for the message.
            understood: The values of the autoencoder's configuration that are understood.
        """
        vae = self._examined(AutoencoderKL, "vae", understood)
        self.scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        for key, value in latent_channels.items():
            if value != vae.config.latent_channels:
                raise ValueError(
                    f"{config}: {key} is {value}, the autoencoder's latents have {vae.config.latent_channels} "
                    "channels: not a text-to-image denoiser (those for inpainting, depth or instructions are told more)"
                )
        return vae

    def _set_shapes(
        self, image_size: ImageSize, *, channels: int, patch: int = 1, features: int, time_embedding: int
    ) -> None:
        """Set the shapes of images, latents and features.

        Args:
            image_size: Height and width in pixels.
            channels: Of the latents.
            patch: The latents in height and width that are one token.
            features: Channels of the first and last hidden layer together.
            time_embedding: Length of the time's embedding.
        """
        height, width = as_image_size(image_size)
        multiple = self.scale_factor * patch
        if height % multiple or width % multiple:
            raise ValueError(
                f"image_size must be a multiple of {multiple} above 0 for {self.source!r}, got {image_size!r}"
            )
        self.image_shape = (3, height, width)
        self.latent_shape = (channels, height // self.scale_factor, width // self.scale_factor)
        rows, columns = (min(side // multiple, _FEATURE_SIZE) for side in (height, width))
        self.feature_shape = (features, rows, columns)
        self.time_embedding_size = time_embedding

    def _loaded(
        self, network: Any, name: str, dtype: torch.dtype, *, is_offloaded: bool = False, is_sharded: bool = False
    ) -> Any:
        file, variant = self._files[name]
        with outside_inference_mode(), no_progress_bar():
            loaded = network.from_pretrained(
                self.path,
                subfolder=name,
                variant=variant,
                use_safetensors=".safetensors" in file.name,
                torch_dtype=dtype,  # else it would be made in float32: 48 GB for Flux
            )
            return self._frozen(loaded, dtype, is_offloaded=is_offloaded, is_sharded=is_sharded)

    def _loaded_text_encoder(self, encoder: TextEncoder) -> nn.Module:
        """Return a text encoder's network."""
        with outside_inference_mode(), no_progress_bar():
            loaded = encoder.network.from_pretrained(
                self.path,
                subfolder=encoder.name,
                variant=encoder.variant,
                use_safetensors=".safetensors" in encoder.weights.name,
                trust_remote_code=False,
                **{_DTYPE: self.text_encoder_dtype},
            )
            encoder.device = self.device if self.offload else None
            # In float16 transformers leaves some layers of T5 in float32, whose numbers would be too large.
            return self._frozen(loaded, None, is_offloaded=self.offload)

    @override
    def release_text_encoders(self) -> None:
        with self._rows_lock:
            released = {name: value for name, value in vars(self).items() if isinstance(value, PreTrainedModel)}
            for name in released:
                delattr(self, name)
            self._states = [state for state in self._states if state[0] not in released.values()]

    @cached_property
    def _text_encoder(self) -> nn.Module:
        return self._loaded_text_encoder(self._text)

    @cached_property
    def _text_encoder_2(self) -> nn.Module:
        return self._loaded_text_encoder(self._text_2)

    @cached_property
    def denoiser(self) -> nn.Module:
        """The frozen denoising network."""
        return self._loaded(self.network, self.denoiser_folder, self.dtype, is_sharded=self.is_sharded)

    @cached_property
    def _vae(self) -> AutoencoderKL:
        return self._loaded(AutoencoderKL, "vae", torch.float32, is_offloaded=self.offload)

    def _as_map(self, hidden: Tensor) -> Tensor:
        """Return a hidden layer as a map [B, C', h, w]."""
        return hidden

    def _model_features(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        with outputs_of(network, self.feature_layers) as seen:
            output = self._model_output(network, latents, t, conditioning, guidance_scale)
        first, last, time = (seen[name] for name in self.feature_layers)
        return output, torch.cat([self._as_map(first), self._as_map(last)], dim=1), time

    def _decode(self, latents: Tensor) -> Tensor:
        latents = latents / self._vae.config.scaling_factor + self._latent_shift
        with lent(self._vae, self.device if self.offload else None):
            return (self._vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    @override
    def encode(self, images: Tensor) -> Tensor:
        with lent(self._vae, self.device if self.offload else None):
            posterior = self._vae.encode(images.float() * 2 - 1).latent_dist
        return (posterior.mode() - self._latent_shift) * self._vae.config.scaling_factor


@contextlib.contextmanager
def outputs_of(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of layers, by their names, of the passes through a network in this context: forward hooks."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: seen.update({name: output})

    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
