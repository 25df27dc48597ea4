"""The contract that environments and policies have with a diffusion model.

Classifier-free guidance lives here, once, for every family of models.
"""

import contextlib
import math
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..predictions import PredictionType, to_x0_and_epsilon
from ..samplers import DDIM, Sampler
from ..schedules import NoiseSchedule, as_float
from . import sharding
from .weights import sample_weights

Conditioning = Mapping[str, Tensor]
ImageSize = int | tuple[int, int]

_NEGATIVE = "negative_"
_DECODED_PIXELS_PER_CHUNK = 8 * 512 * 512
_CACHED_PROMPT_BYTES = 2**31  # 9,078 prompts of Stable Diffusion 1.5, 393 of 3, 255 of Flux
_SETTINGS = ("default_guidance_scale", "default_prompts", "lora_targets", "prediction_type", "schedule")

_Network = TypeVar("_Network", bound=nn.Module)


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """The context in which new tensors can be trained on later, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _state_of(network: nn.Module) -> list[tuple[str, int, int]]:
    """Return the name, address and version of each tensor: they differ once a weight is changed, replaced or moved."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return [(name, tensor.data_ptr(), tensor._version) for name, tensor in tensors]


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, and how it is held: what `load_model` was asked for.

    Args:
        source: A name, a folder (from the root) or a Hub id.
        path: The diffusers folder behind the source.
        device: The device of the networks and of all results.
        dtype: The frozen denoiser's precision.
        text_encoder_dtype: That of the text encoders. The image decoder stays in float32.
        image_size: In pixels; None: what the model was trained on.
        revision: The Hub's branch, tag or commit.
        variant: The variant of the weights.
        without: The parts of the folder that are left out.
        offload: Text encoders and autoencoder stay on the CPU between uses.
    """

    source: str
    path: Path
    device: torch.device
    dtype: torch.dtype
    text_encoder_dtype: torch.dtype = torch.float32
    image_size: ImageSize | None = None
    revision: str | None = None
    variant: str | None = None
    without: tuple[str, ...] = ()
    offload: bool = False


@dataclass(frozen=True, eq=False)
class Prediction:
    """A denoiser's prediction at x_t.

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
    owns a copy of what it trains. So a copy of it, deep or not, is itself; a pickle holds its folder on this machine
    and its settings, and never asks the Hub.

    Args:
        origin: Where it comes from; its fields are attributes of the model too.

    Attributes:
        optional_parts: The parts of the folder that can be left out.
        has_text_encoders: There are text encoders and an autoencoder, which have a precision and may stay on the CPU.
        default_guidance_scale: The guidance scale of policies that are given none.
        is_sharded: The denoiser's weights are divided among the processes that `accelerate launch --use_fsdp` started
            (see `diffusion_gym.models.sharding`). All of them have to make the same passes, and call `denoise` for it:
            a network itself cannot be called.
        schedule: The noise process.
        prediction_type: The quantity that the denoiser predicts.
        latent_shape: [C, H, W] of one sample's latents.
        image_shape: [3, H, W] of one image.
        feature_shape: [2C', h', w'] of one sample's features, h' and w' at most 16.
        time_embedding_size: E, the length of the denoiser's time embedding.
        denoiser_folder: The denoiser's subfolder in the diffusers layout.
        lora_targets: Names of the layers that LoRA adapts unless told otherwise.
        guidance: The way in which a prompt is given weight. "classifier_free": by two passes, one of them with the
            negative prompt. "embedded": the network is told the scale, and there is no negative prompt. "none": it was
            distilled for one scale and is told none.
        default_sampler: The sampler of policies that are given none.
        boundary_time: Of a consistency model, whose prediction of x_0 is the consistency function f: the time at which
            f(x, t) = x. None: it is none.
        guidance_layers: Names of the denoiser's layers that are told the guidance scale, and nothing else.
        default_prompts: The prompts of environments that are given none: a prompt set's name, or texts.
    """

    optional_parts: tuple[str, ...] = ()
    has_text_encoders: bool = False
    is_sharded: bool = False
    schedule: NoiseSchedule
    prediction_type: PredictionType
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    feature_shape: tuple[int, int, int]
    time_embedding_size: int
    default_guidance_scale: float
    denoiser_folder: str
    lora_targets: tuple[str, ...]
    guidance: Literal["classifier_free", "embedded", "none"] = "classifier_free"
    default_sampler: Sampler = DDIM(eta=1.0)
    boundary_time: float | None = None
    guidance_layers: tuple[str, ...] = ()
    default_prompts: str | tuple[str, ...] = "simple_animals"

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.source, self.path, self.device = origin.source, origin.path, origin.device
        self.dtype, self.text_encoder_dtype = origin.dtype, origin.text_encoder_dtype
        self.revision, self.variant = origin.revision, origin.variant
        self.without, self.offload = origin.without, origin.offload
        self._rows: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._table: tuple[tuple[tuple[str, ...], str], dict[str, Tensor]] | None = None
        self._rows_lock = threading.RLock()
        self._states: list[tuple[nn.Module, list[tuple[str, int, int]]]] = []
        self._runners: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self._sample: list[float] = []

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.image_shape[1], self.image_shape[2]

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The frozen denoising network, in eval mode, without gradients."""

    @abstractmethod
    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditioning of the prompts, without negatives: tensors [P, ...] in float32."""

    @abstractmethod
    def _model_output(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """Return the network's raw output for one pass over a batch.

        Args:
            network: The denoiser.
            latents: [B, C, H, W] x_t.
            t: [B] the time of each sample.
            conditioning: [B, ...] each, without negatives.
            guidance_scale: The scale that a network with embedded guidance is told. One with classifier-free guidance
                ignores it: `denoise` guides.
        """

    @abstractmethod
    def _model_features(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the raw output, the features [B, 2C', h, w] and the time embedding [B, E] of one pass.

        The arguments are those of `_model_output`.
        """

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

    def guidance_scale_of(self, value: float | None) -> float:
        """Return the guidance scale that an argument asks for: None for the model's default.

        Raises:
            ValueError: it is not finite, negative, or would have no effect.
        """
        if value is None:
            return self.default_guidance_scale
        scale = checked_guidance_scale(value)
        if scale > 1 and self.guidance == "none":
            raise ValueError(
                f"guidance_scale={value!r} has no effect: {self.source!r} was distilled for one scale, and is told "
                "none; leave it out"
            )
        return scale

    def encode_prompts(self, prompts: Sequence[str], negative_prompt: str = "") -> Conditioning:
        """Return the conditioning of prompts, for classifier-free guidance with the negative prompt beside it.

        The embeddings of the prompts asked for last are kept on the device, up to 2 GiB (9,078 of Stable Diffusion 1.5,
        393 of 3, 255 of Flux) and at least those of this call: only prompts that are used are encoded, however large
        the prompt set is.

        Args:
            prompts: The P texts.
            negative_prompt: The text of the unconditional half of classifier-free guidance.

        Returns:
            A dict of float32 tensors [P, ...] to read only: `prompt_embeds` …, with classifier-free guidance each with
            `negative_prompt_embeds` … of the same shape (which share the memory of one row).

        Raises:
            TypeError: the prompts are not texts.
            ValueError: there is a negative prompt, but the model's guidance is not classifier-free.
        """
        texts = [*prompts, negative_prompt]
        if isinstance(prompts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(
                "prompts must be a sequence of texts, and negative_prompt a text; "
                f"got {prompts!r:.200} and {negative_prompt!r:.200}"
            )
        has_negatives = self.guidance == "classifier_free"
        if negative_prompt and not has_negatives:
            raise ValueError(
                f"negative_prompt={negative_prompt!r} has no effect: {self.source!r} is not guided by a second pass; "
                "leave it out"
            )
        with self._rows_lock, outside_inference_mode():
            rows = self._rows_of(list(dict.fromkeys(texts if has_negatives or not prompts else prompts)))
            conditioning = {}
            for key, row in next(iter(rows.values())).items():
                positive = [rows[prompt][key] for prompt in prompts]
                conditioning[key] = torch.stack(positive) if positive else row.new_empty(0, *row.shape)
                if has_negatives:
                    negative = self._as_negative(negative_prompt, rows[negative_prompt][key])
                    conditioning[_NEGATIVE + key] = negative.expand_as(conditioning[key])
        return conditioning

    def prompt_table(self, prompts: Sequence[str], negative_prompt: str = "") -> Conditioning:
        """Return what `encode_prompts` does, and keep it until another table is asked for: to look prompts up by index.

        The embeddings are held once: `encode_prompts` finds those of these prompts in the table.

        Args:
            prompts: The texts of a whole prompt set.
            negative_prompt: As in `encode_prompts`.
        """
        asked = (tuple(prompts), negative_prompt)
        with self._rows_lock, outside_inference_mode():
            if self._table is not None and self._table[0] == asked:
                return self._table[1]
            for prompt in self._table[0][0] if self._table is not None else ():
                if prompt in self._rows:  # a view of it would keep all of the old table
                    self._rows[prompt] = {key: value.clone() for key, value in self._rows[prompt].items()}
            table = dict(self.encode_prompts(prompts, negative_prompt))
            for index, prompt in enumerate(prompts):
                self._rows[prompt] = {key: table[key][index] for key in self._rows[prompt]}
            self._table = asked, table
            return table

    def _as_negative(self, prompt: str, row: Tensor) -> Tensor:
        """Return what the negative prompt's conditioning is, given that of its text: the same, unless overridden."""
        return row

    def _rows_of(self, prompts: list[str]) -> dict[str, dict[str, Tensor]]:
        """Return the conditioning of each prompt, [...] each, and forget those that were not asked for the longest."""
        misses = [prompt for prompt in prompts if prompt not in self._rows]
        if misses:
            encoded = self._encode(misses)
            for index, prompt in enumerate(misses):
                self._rows[prompt] = {key: value[index].clone() for key, value in encoded.items()}
        for prompt in prompts:
            self._rows.move_to_end(prompt)
        rows = {prompt: self._rows[prompt] for prompt in prompts}
        size = sum(value.nbytes for value in next(iter(rows.values())).values())
        while len(self._rows) > len(prompts) and len(self._rows) * size > _CACHED_PROMPT_BYTES:
            self._rows.popitem(last=False)
        return rows

    def _frozen(
        self, network: _Network, dtype: torch.dtype | None, *, is_offloaded: bool = False, is_sharded: bool = False
    ) -> _Network:
        """Return a network that has just been loaded, frozen, on the device.

        Args:
            network: The network.
            dtype: The precision; None: that in which it was loaded.
            is_offloaded: It stays on the CPU.
            is_sharded: Only this process's share of its weights is on the device.
        """
        device = torch.device("cpu") if is_offloaded or is_sharded else self.device
        network = nn.Module.to(network, device=device, dtype=dtype).eval().requires_grad_(False)
        if is_sharded:
            self._sample = sample_weights(network)
            sharding.shard(network, self.device)
        self._states.append((network, _state_of(network)))
        return network

    def sample_weights(self) -> list[float]:
        """Return a few of the denoiser's weights, which tell it from others of its shape: see `weights`."""
        return self._sample if self.is_sharded and self.denoiser else sample_weights(self.denoiser)

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
        """Return a denoiser's prediction at x_t, guided towards the prompt.

        Classifier-free guidance is output(negative) + guidance_scale·(output(prompt) − output(negative)), and so for
        the features. A scale of at most 1 is no guidance, as in diffusers' pipelines: the prompt's own output, at half
        the cost. A model whose guidance is embedded is told the scale, in one pass.

        Source: Ho & Salimans, 2022, eq. 6, https://arxiv.org/abs/2207.12598.

        Args:
            latents: [B, C, H, W] x_t.
            t: [B] the time of each sample, in the schedule's own values.
            conditioning: What `encode_prompts` returns, [B, ...] each.
            guidance_scale: The scale w, at least 0 (see `checked_guidance_scale`).
            denoiser: The network to ask; None: the frozen one.
            with_features: Return its features and time embedding too.
        """
        network = self._runner(self.denoiser if denoiser is None else denoiser)
        inputs = {key: value for key, value in conditioning.items() if not key.startswith(_NEGATIVE)}
        x, times = latents, t
        is_guided = guidance_scale > 1 and self.guidance == "classifier_free"
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
            raw, layers, embedding = self._model_features(network, x, times, inputs, guidance_scale)
            features = F.adaptive_avg_pool2d(guided(layers), self.feature_shape[1:])
            time_embedding = guided(embedding)
        else:
            raw = self._pass(network, x, times, inputs, guidance_scale)
        return Prediction(*self.to_x0_and_epsilon(guided(raw), as_float(latents), t), features, time_embedding)

    def _runner(self, network: nn.Module) -> nn.Module:
        """Return what can be called for a network: its counterpart that gathers weights, made at the first pass."""
        if not self.is_sharded or not any(map(sharding.is_shard, network.parameters())):
            return network
        if network not in self._runners:
            self._runners[network] = sharding.runner(network)
        return self._runners[network]

    def _pass(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """Return the raw output of one pass.

        A process whose batch is empty makes a pass of zeros beside the others, who need its share of the weights.
        """
        if len(latents) or not self.is_sharded:
            return self._model_output(network, latents, t, conditioning, guidance_scale)
        zeros = {key: value.new_zeros(1, *value.shape[1:]) for key, value in conditioning.items()}
        one = latents.new_zeros(1, *latents.shape[1:])
        return self._model_output(network, one, t.new_zeros(1), zeros, guidance_scale)[:0]

    def to_x0_and_epsilon(self, model_output: Tensor, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x̂_0 and ε̂ of the network's guided output at x_t; x_t = α_t·x̂_0 + σ_t·ε̂.

        Args:
            model_output: [B, ...] at least float32.
            latents: [B, ...] x_t, at least float32.
            t: [B] the time of each sample.
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return to_x0_and_epsilon(model_output, latents, alpha=alpha, sigma=sigma, prediction_type=self.prediction_type)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] in [0, 1], float32, of latents [B, C, h, w]; in chunks of bounded memory."""
        chunk = max(1, _DECODED_PIXELS_PER_CHUNK // (self.image_shape[1] * self.image_shape[2]))
        return torch.cat([self._decode(part) for part in latents.float().split(chunk)])

    def release_text_encoders(self) -> None:
        """Let the memory of text encoders go, if there are any: a prompt whose embedding is not kept loads them again.

        Call it once the prompts are encoded: `model.encode_prompts(env.unwrapped.prompts.texts)`.
        """

    def use_training_attention(self, network: nn.Module, *, bf16: bool) -> None:
        """Choose the attention that computes fastest where this network is trained; by default nothing."""

    def __copy__(self) -> "DiffusionModel":
        return self

    def __deepcopy__(self, memo: object) -> "DiffusionModel":
        return self

    def __reduce__(self) -> tuple[object, ...]:
        if any(_state_of(network) != state for network, state in self._states):
            raise ValueError(
                f"the weights of the model {self.source!r} were changed after it was loaded, and a pickle holds none: "
                "save them as a diffusers folder and load_model that one"
            )
        from .loading import reload_model

        origin = replace(self.origin, device=self.device, image_size=self.image_size)
        return reload_model, (origin, {name: getattr(self, name) for name in _SETTINGS if name in vars(self)})


def checked_guidance_scale(value: float) -> float:
    """Return a classifier-free guidance scale as a float; every scale of at most 1 means no guidance, as in diffusers.

    Raises:
        ValueError: it is no number, not finite or negative.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"guidance_scale must be a finite number of at least 0 (up to 1: no guidance), got {value!r}")
    return float(value)


def as_image_size(value: ImageSize) -> tuple[int, int]:
    """Return the height and width that `image_size` stands for.

    Raises:
        ValueError: it is neither a whole number above 0 nor two of them.
    """
    size = value if isinstance(value, Sequence) else (value, value)
    if len(size) != 2 or any(isinstance(side, bool) or not isinstance(side, Integral) or side < 1 for side in size):
        raise ValueError(f"image_size must be a whole number above 0, or (height, width), got {value!r}")
    return int(size[0]), int(size[1])


def to_device(device: str | torch.device) -> torch.device:
    """Return the torch device, once it has been tried, with its index: "cuda" is "cuda:0", and "cpu:0" is "cpu".

    Raises:
        ValueError: there is no such device here.
    """
    try:
        usable = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f'device {device!r} cannot be used here ({error}): "cpu" always can') from error
    return torch.device("cpu") if usable.type == "cpu" else usable


def to_dtype(dtype: str | torch.dtype, name: str = "dtype") -> torch.dtype:
    """Return a floating-point torch dtype, given by its name ("float32", "bfloat16" …) or as itself.

    Args:
        dtype: The dtype.
        name: The argument's name, for the message.

    Raises:
        ValueError: it is not the name of a floating-point dtype.
    """
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ValueError(f'{name} must be a floating-point dtype such as "float32" or "bfloat16", got {dtype!r}')
    return torch_dtype
