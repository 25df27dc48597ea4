"""What an environment or a policy asks of a diffusion model, and the way to load one.

Classifier-free guidance lives here, once, for every family of models.
"""

import importlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from numbers import Real
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..naming import unknown_name
from ..predictions import PredictionType, to_x0_and_epsilon
from ..schedules import NoiseSchedule, as_float

Conditioning = Mapping[str, Tensor]

_NEGATIVE = "negative_"
_DECODED_PIXELS_PER_CHUNK = 8 * 512 * 512
_CACHED_PROMPT_SETS = 4

_PACKAGED = {"emoji": 4.0, "mixture": 1.0}
_FAMILIES = {
    "MixturePipeline": "mixture:MixtureModel",
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusionModel",
}


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a denoiser says of x_t.

    Args:
        x0: [B, C, H, W] the clean latents x̂_0, at least float32.
        epsilon: [B, C, H, W] the noise ε̂, at least float32.
        features: [B, *feature_shape] float32, if asked for: the denoiser's first and last hidden layer, one above the
            other, in raster order.
        time_embedding: [B, time_embedding_size] float32, if asked for.
    """

    x0: Tensor
    epsilon: Tensor
    features: Tensor | None = None
    time_embedding: Tensor | None = None


class DiffusionModel(ABC):
    """A text-to-image diffusion model whose text encoder, image decoder and denoiser load on first use.

    One object is shared by an environment and the policies that act in it. Nothing in it is ever trained: a policy
    owns a copy of what it trains.

    Args:
        source: What `load_model` was given: a name, a folder or a Hub id.
        path: The diffusers folder that it was found in.
        device: Where the networks are and where all results are.
        dtype: The frozen denoiser's precision. Text encoder and image decoder stay in float32.
        default_guidance_scale: The guidance scale of policies that name none.

    Attributes:
        revision: The Hub's branch, tag or commit that was asked for.
        schedule: The noise process.
        prediction_type: What the denoiser predicts.
        latent_shape: [C, H, W] of one sample's latents.
        image_shape: [3, H, W] of one image.
        feature_shape: [2C', h', w'] of one sample's features, h' and w' at most 16.
        time_embedding_size: E, the length of the denoiser's time embedding.
        denoiser_folder: The denoiser's subfolder in the diffusers layout.
        lora_targets: Names of the layers that LoRA adapts unless told otherwise.
        default_prompts: The prompts of environments that name none: a prompt set's name, or texts.
    """

    revision: str | None = None
    schedule: NoiseSchedule
    prediction_type: PredictionType
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    feature_shape: tuple[int, int, int]
    time_embedding_size: int
    default_guidance_scale: float
    denoiser_folder: str
    lora_targets: tuple[str, ...]
    default_prompts: str | tuple[str, ...] = "simple_animals"

    def __init__(
        self, source: str, path: Path, *, device: torch.device, dtype: torch.dtype, default_guidance_scale: float
    ) -> None:
        self.source = source
        self.path = path
        self.device = device
        self.dtype = dtype
        self.default_guidance_scale = default_guidance_scale
        self._encode_cached = lru_cache(maxsize=_CACHED_PROMPT_SETS)(self._encode_with_negative)

    # ------------------------------------------------------------------ what a family of models has to provide
    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The frozen denoising network, in eval mode, without gradients."""

    @abstractmethod
    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditioning of the prompts, without negatives: tensors [P, ...] in float32."""

    @abstractmethod
    def _model_output(self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the network's raw output for one pass over a batch."""

    @abstractmethod
    def _model_features(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the raw output, the features [B, 2C', h, w] and the time embedding [B, E] of one pass."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """Return images [B, 3, H, W] in [0, 1] of a batch that is small enough."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Return the latents [B, C, h, w] of images [B, 3, H, W] in [0, 1]: the mode of the encoder's posterior."""

    @abstractmethod
    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        """Write a denoiser's LoRA layers in the form that the diffusers pipeline's `load_lora_weights` reads."""

    @abstractmethod
    def load_lora(self, denoiser: nn.Module, folder: Path) -> None:
        """Read what `save_lora` wrote into a denoiser that has LoRA layers of the same shape.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or not just the denoiser's layers are in it, all of them finite.
        """

    # ------------------------------------------------------------------ what is the same for all
    def encode_prompts(self, prompts: Sequence[str], negative_prompt: str = "") -> Conditioning:
        """Return the conditioning of prompts, for guidance with the negative prompt beside it.

        The last few prompt sets are remembered, so an environment and its policies encode theirs once.

        Args:
            prompts: The P texts.
            negative_prompt: What the unconditional half of the guidance is told.

        Returns:
            A dict of float32 tensors [P, ...] to read only: `prompt_embeds` …, each with `negative_prompt_embeds` …
            of the same shape (which share the memory of one row).
        """
        return self._encode_cached(tuple(prompts), negative_prompt)

    @torch.no_grad()
    def _encode_with_negative(self, prompts: tuple[str, ...], negative_prompt: str) -> Conditioning:
        conditioning = self._encode(prompts)
        negative = self._encode([negative_prompt])
        return conditioning | {f"{_NEGATIVE}{key}": row.expand_as(conditioning[key]) for key, row in negative.items()}

    def denoise(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        *,
        guidance_scale: float,
        denoiser: nn.Module | None = None,
        with_features: bool = False,
    ) -> Prediction:
        """Return what a denoiser says of x_t, with classifier-free guidance.

        output = output(negative) + guidance_scale·(output(prompt) − output(negative)), and so for the features. A scale
        of at most 1 is no guidance, as in diffusers' pipelines: the prompt's own output, at half the cost.

        Source: Ho & Salimans, 2022, eq. 6, https://arxiv.org/abs/2207.12598.

        Args:
            latents: [B, C, H, W] x_t.
            t: [B] the time of each sample, in the schedule's own values.
            conditioning: What `encode_prompts` returns, [B, ...] each.
            guidance_scale: The scale w, at least 0 (see `checked_guidance_scale`).
            denoiser: The network to ask; None: the frozen one.
            with_features: Return its features and time embedding too.
        """
        network = self.denoiser if denoiser is None else denoiser
        inputs = {key: value for key, value in conditioning.items() if not key.startswith(_NEGATIVE)}
        x, times = latents, t
        is_guided = guidance_scale > 1
        if is_guided:
            inputs = {key: torch.cat([conditioning[_NEGATIVE + key], value]) for key, value in inputs.items()}
            x, times = torch.cat([latents, latents]), torch.cat([t, t])

        def guided(doubled: Tensor) -> Tensor:
            if not is_guided:
                return as_float(doubled)
            negative, positive = as_float(doubled).chunk(2)
            return negative + guidance_scale * (positive - negative)

        features = time_embedding = None
        if with_features:
            raw, layers, embedding = self._model_features(network, x, times, inputs)
            features = F.adaptive_avg_pool2d(guided(layers), self.feature_shape[1:])
            time_embedding = guided(embedding)
        else:
            raw = self._model_output(network, x, times, inputs)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        pred_x0, pred_epsilon = to_x0_and_epsilon(
            guided(raw), as_float(latents), alpha=alpha, sigma=sigma, prediction_type=self.prediction_type
        )
        return Prediction(pred_x0, pred_epsilon, features, time_embedding)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] in [0, 1], float32, of latents [B, C, h, w]; in chunks of bounded memory."""
        chunk = max(1, _DECODED_PIXELS_PER_CHUNK // (self.image_shape[1] * self.image_shape[2]))
        return torch.cat([self._decode(part) for part in latents.float().split(chunk)])

    def __reduce__(self) -> tuple[object, ...]:
        arguments = (self.source, str(self.device), str(self.dtype).removeprefix("torch."), self.image_shape[1])
        return _reload, (*arguments, self.revision)


def _reload(source: str, device: str, dtype: str, image_size: int, revision: str | None) -> DiffusionModel:
    return load_model(source, device=device, dtype=dtype, image_size=image_size, revision=revision)


def checked_guidance_scale(value: float) -> float:
    """Return a classifier-free guidance scale as a float; every scale of at most 1 means no guidance, as in diffusers.

    Raises:
        ValueError: it is no number, not finite or negative.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"guidance_scale must be a finite number of at least 0 (up to 1: no guidance), got {value!r}")
    return float(value)


def to_device(device: str | torch.device) -> torch.device:
    """Return the torch device, once it has been tried.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'device {device!r} cannot be used here ({error}): "cpu" always can') from error
    return torch.device(device)


def to_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a floating-point torch dtype of its name ("float32", "bfloat16" …) or itself.

    Raises:
        ValueError: it is not the name of a floating-point dtype.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f'dtype must be a floating-point dtype such as "float32" or "bfloat16", got {dtype!r}')
    return found


def _find_folder(source: str | os.PathLike[str], revision: str | None) -> Path:
    """Return the diffusers folder behind a name, a folder or a Hub id; what the Hub has is downloaded to its cache."""
    if source in _PACKAGED:
        return Path(str(files(__package__) / str(source)))
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is not a diffusers folder: it has no model_index.json")
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(
            unknown_name("model", str(source), _PACKAGED) + " Or give a diffusers folder, or a Hub id owner/name."
        )
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(str(source), revision=revision))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no folder {str(source)!r} here, and the Hugging Face Hub did not give a model of that id ({error}). "
            f"Give {sorted(_PACKAGED)} for the model that comes with the package, or the path of a diffusers folder."
        ) from error


def load_model(
    source: str | os.PathLike[str] = "emoji",
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    image_size: int | None = None,
    revision: str | None = None,
) -> DiffusionModel:
    """Return a diffusion model; its networks load when they are first needed.

    Args:
        source: "emoji" or "mixture" (both come with the package and work offline: 64×64 emoji, and a Gaussian mixture
            of which everything is known), a folder in diffusers' layout, or a Hub id such as
            "stable-diffusion-v1-5/stable-diffusion-v1-5". The family is read from `model_index.json`.
        device: A torch device.
        dtype: The frozen denoiser's precision.
        image_size: Height and width in pixels; None: what the model was trained on.
        revision: The Hub's branch, tag or commit.

    Raises:
        FileNotFoundError: there is no such model.
        TypeError: `source` is none of these.
        ValueError: its family is not supported, or `image_size`, `dtype` or `device` cannot be had.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"the model must be a name, a diffusers folder or a Hub id, got {source!r}")
    path = _find_folder(source, revision)
    class_name = json.loads((path / "model_index.json").read_text())["_class_name"]
    if class_name not in _FAMILIES:
        raise ValueError(unknown_name("model family", class_name, _FAMILIES) + f" It is named in {path}.")
    module, _, name = _FAMILIES[class_name].partition(":")
    family = getattr(importlib.import_module(f".{module}", __package__), name)
    model = family(
        os.fspath(source),
        path,
        device=to_device(device),
        dtype=to_dtype(dtype),
        image_size=image_size,
        default_guidance_scale=_PACKAGED.get(str(source), family.default_guidance_scale),
    )
    model.revision = revision
    return model
