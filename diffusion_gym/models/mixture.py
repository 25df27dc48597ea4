"""A Gaussian mixture as a diffusion model: everything is known in closed form, and a step takes microseconds."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn
from typing_extensions import override

from ..naming import unknown_name
from ..schedules import as_float
from ..transitions import draw_noise
from .base import Conditioning, DiffusionModel, Origin, as_image_size, outside_inference_mode
from .folders import check_weights, empty_network, find_weights, read_config
from .lora import load_lora, save_lora
from .schedulers import FLOW, KARRAS, discrete_schedule, flow_schedule, karras_schedule

ANYTHING = "anything"

_DDPM = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing", "clip_sample": False}
_FREQUENCIES = 8
_IMAGE_CHANNELS = 3


def _check_components(means: Sequence[Sequence[float]], stds: Sequence[float], weights: Sequence[float]) -> None:
    """Check that means, standard deviations and weights describe a mixture.

    Raises:
        ValueError: they are not.
    """
    if not len(means) == len(stds) == len(weights) > 0 or len({len(row) for row in means}) != 1:
        raise ValueError(
            "means must be K rows of one length, and stds and weights K each; got "
            f"{[len(row) for row in means]}, {len(stds)} and {len(weights)}"
        )
    if not all(isinstance(value, Real) and math.isfinite(value) for row in (*means, stds, weights) for value in row):
        raise ValueError(f"means, stds and weights must be finite numbers, got {means}, {stds} and {weights}")
    if min(stds) <= 0 or min(weights) <= 0:
        raise ValueError(f"stds and weights must be positive, got {list(stds)} and {list(weights)}")


class Mixture(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A network that knows a Gaussian mixture.

    p(x_0) = Σ_k w_k·N(m_k, s_k²·I)    p(x_t) = Σ_k w_k·N(α·m_k, v_k·I),  v_k = α²·s_k² + σ²
    """

    centres: Tensor
    variances: Tensor
    log_weights: Tensor

    def _set_components(
        self, means: Sequence[Sequence[float]], stds: Sequence[float], weights: Sequence[float]
    ) -> None:
        """Set the mixture: [K, d] means m_k, [K] standard deviations s_k, [K] weights w_k.

        Raises:
            ValueError: they do not describe a mixture.
        """
        _check_components(means, stds, weights)
        self.register_buffer("centres", torch.tensor(means, dtype=torch.float32), persistent=False)
        self.register_buffer("variances", torch.tensor(stds, dtype=torch.float32).square(), persistent=False)
        self.register_buffer("log_weights", torch.tensor(weights, dtype=torch.float32).log(), persistent=False)

    def log_joint(self, x: Tensor, alpha: Tensor, sigma: Tensor, present: Tensor) -> Tensor:
        """Return log w_k·N(x_t; α·m_k, v_k·I) of every component, [B, K]; −∞ of those that are not there.

        Args:
            x: [B, d] x_t.
            alpha: [B].
            sigma: [B].
            present: [B, K] 1 for the components that the prompt names, else 0.
        """
        weights = (as_float(self.log_weights) + as_float(present).log()).log_softmax(-1)
        variance = alpha[:, None].square() * as_float(self.variances) + sigma[:, None].square()
        away = (x[:, None] - alpha[:, None, None] * as_float(self.centres)).square().sum(-1)
        return weights - away / (2 * variance) - x.shape[1] / 2 * torch.log(2 * math.pi * variance)

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, present: Tensor) -> Tensor:
        """Return E[x_0|x_t], [B, d]; the arguments are those of `log_joint`."""
        responsibility = self.log_joint(x, alpha, sigma, present).softmax(-1)
        means, variances = as_float(self.centres), as_float(self.variances)
        gain = alpha[:, None] * variances / (alpha[:, None].square() * variances + sigma[:, None].square())
        x0 = means + gain[..., None] * (x[:, None] - alpha[:, None, None] * means)
        return (responsibility[..., None] * x0).sum(1)


class MixtureDenoiser(Mixture):
    """The exact ε̂ of a Gaussian mixture, plus a small trainable network whose last layer starts at zero.

        E[x_0|x_t] = Σ_k p(k|x_t)·(m_k + α·s_k²/v_k·(x_t − α·m_k))    ε̂ = (x_t − α·E[x_0|x_t])/σ

    On a flow it is the velocity ε̂ − E[x_0|x_t], which says all at t = 1 too, where ε̂ = x_t says nothing of x_0.

    Args:
        means: [K, d] the components' means m_k.
        stds: [K] their standard deviations s_k.
        weights: [K] their weights w_k, which need not sum to 1.
        width: The hidden layers' width.
        prediction_type: "epsilon", or "flow" for the velocity.

    Raises:
        ValueError: they do not describe a mixture.
    """

    @register_to_config
    def __init__(
        self,
        means: Sequence[Sequence[float]],
        stds: Sequence[float],
        weights: Sequence[float],
        width: int = 64,
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__()
        self._set_components(means, stds, weights)
        if prediction_type not in ("epsilon", "flow"):
            raise ValueError(f'prediction_type must be "epsilon" or "flow", got {prediction_type!r}')
        self.is_flow = prediction_type == "flow"
        components, dimension = self.centres.shape
        self.first = nn.Linear(dimension + 2 * _FREQUENCIES + components, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, dimension)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self, latents: Tensor, alpha: Tensor, sigma: Tensor, present: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Return ε̂ or the velocity [B, d], the two hidden layers [B, width] each, and the time's embedding [B, 2·8].

        The arguments are those of `log_joint`.
        """
        x = as_float(latents)
        x0 = self.posterior_mean(x, alpha, sigma, present)
        epsilon = (x - alpha[:, None] * x0) / sigma[:, None]
        exact = epsilon - x0 if self.is_flow else epsilon
        # log σ/α of a flow is infinite at t = 1; 10·σ spans about as much as DDPM's.
        level = 10 * sigma if self.is_flow else torch.log(sigma / alpha)
        angles = level[:, None] * (2.0 ** torch.arange(_FREQUENCIES, device=x.device) / 8)
        embedding = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
        inputs = torch.cat([x, embedding, present], -1).to(self.first.weight.dtype)
        first = F.silu(self.first(inputs))
        second = F.silu(self.second(first))
        return exact + self.last(second), (first, second), embedding


class MixtureModel(DiffusionModel):
    """A Gaussian mixture in R^d as a text-to-image model: `load_model("mixture")`, or a folder of `write_mixture`.

    Prompts name the components that a sample may come from: "north", "north and south", or "anything" for all of them
    (as the empty text does). "mixture" itself has eight, on a circle of radius 2 in the plane, with standard deviation
    0.25. The process is DDPM's (1,000 linear steps, ᾱ_T = 4·10⁻⁵); a folder may have any other, and a rectified flow.

    An "image" holds the sample's coordinates, x ↦ 0.5 + x/(2·extent), as colours of [3, 1, ⌈d/3⌉] pixels: `positions`
    is the way back. Coordinates beyond ±extent are cut off, which no sample near the mixture has.

    Raises:
        ValueError: `image_size` is given and is not 1.
    """

    network: type[Mixture] = MixtureDenoiser
    default_guidance_scale = 1.0
    denoiser_folder = "denoiser"
    lora_targets: tuple[str, ...] = ("first", "second", "last")

    def __init__(self, origin: Origin) -> None:
        super().__init__(origin)
        path, image_size = self.path, origin.image_size
        file = path / self.denoiser_folder / "config.json"
        config = read_config(file)
        empty = empty_network(lambda: self.network.from_config(config), file)
        check_weights(empty, find_weights(file.parent, "diffusion_pytorch_model", self.variant)[0])
        names = read_config(path / "model_index.json").get("names")
        if (
            not isinstance(names, list)
            or len(names) != len(config["means"])
            or not all(isinstance(name, str) for name in names)
        ):
            raise ValueError(
                f"{path / 'model_index.json'}: names must be {len(config['means'])} texts, one for each of the means "
                f"in {file}, got {names!r}"
            )
        self.names: tuple[str, ...] = tuple(names)
        self.dimension = len(config["means"][0])
        self.extent = max(abs(value) for row in config["means"] for value in row) + 8 * max(config["stds"])
        self.latent_shape = (self.dimension, 1, 1)
        self.image_shape = (_IMAGE_CHANNELS, 1, math.ceil(self.dimension / _IMAGE_CHANNELS))
        self.feature_shape = (2 * config["width"], 1, 1)
        self.time_embedding_size = 2 * _FREQUENCIES
        self.default_prompts = (ANYTHING, *self.names)
        if image_size not in (None, 1) and as_image_size(image_size) != self.image_size:
            raise ValueError(f"a mixture's images are 1 pixel high, got image_size={image_size}")
        self._examine_scheduler(path / "scheduler", config.get("prediction_type", "epsilon"))

    def _examine_scheduler(self, folder: Path, predicted: str) -> None:
        """Set the schedule, and the prediction type, which must be what the denoiser predicts."""
        name = read_config(folder / "scheduler_config.json").get("_class_name")
        if name == FLOW:
            self.schedule, self.prediction_type = flow_schedule(folder), "flow"
        elif name == KARRAS:
            self.schedule, self.prediction_type = karras_schedule(folder), "epsilon"
        else:
            self.schedule, self.prediction_type = discrete_schedule(folder)
        if self.prediction_type != predicted:
            raise ValueError(f"{folder}: a mixture predicts {predicted}, got {self.prediction_type!r}")

    @cached_property
    def denoiser(self) -> Mixture:
        """The frozen denoiser, which is exact."""
        _, variant = find_weights(self.path / self.denoiser_folder, "diffusion_pytorch_model", self.variant)
        with outside_inference_mode():
            denoiser = self.network.from_pretrained(self.path, subfolder=self.denoiser_folder, variant=variant)
            return self._frozen(denoiser, self.dtype, is_sharded=self.is_sharded)

    def log_prob(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return log p_t(x_t | prompt), [B], with gradients: its gradient is the score −ε̂/σ.

        Args:
            latents: [B, d, 1, 1] x_t.
            t: [B] the times; `schedule.clean` is the clean end.
            conditioning: What `encode_prompts` returns, [B, ...] each.
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return self.denoiser.log_joint(
            as_float(latents).flatten(1), alpha, sigma, conditioning["prompt_embeds"][:, 0]
        ).logsumexp(-1)

    def draw(self, conditioning: Conditioning, generator: torch.Generator | None = None) -> Tensor:
        """Return x_0 [B, d, 1, 1] from the mixture itself, one for each row of the conditioning."""
        weights = conditioning["prompt_embeds"][:, 0] * as_float(self.denoiser.log_weights).exp()
        source = weights if generator is None else weights.to(generator.device)
        component = torch.multinomial(source, 1, generator=generator)[:, 0].to(self.device)
        noise = draw_noise(weights.new_empty(len(component), self.dimension), generator)
        spread = as_float(self.denoiser.variances).sqrt()[component, None]
        return (as_float(self.denoiser.centres)[component] + spread * noise)[:, :, None, None]

    def positions(self, images: Tensor) -> Tensor:
        """Return the coordinates [B, d] that images [B, 3, 1, ⌈d/3⌉] stand for: a reward is a function of these."""
        return (images.flatten(1)[:, : self.dimension] - 0.5) * 2 * self.extent

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        rows = []
        for prompt in prompts:
            named = self.names if prompt in (ANYTHING, "") else prompt.split(" and ")
            for name in named:
                if name not in self.names:
                    raise ValueError(
                        unknown_name("component", name, (ANYTHING, *self.names)) + f" The prompt is {prompt!r}; "
                        'several are joined by " and ".'
                    )
            rows.append([float(name in named) for name in self.names])
        return {"prompt_embeds": torch.tensor(rows, device=self.device, dtype=torch.float32)[:, None]}

    def _model_features(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        output, hidden, embedding = network(latents.flatten(1), alpha, sigma, conditioning["prompt_embeds"][:, 0])
        return output.reshape(latents.shape), torch.cat(hidden, 1)[:, :, None, None], embedding

    def _model_output(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        return self._model_features(network, latents, t, conditioning, guidance_scale)[0]

    def _decode(self, latents: Tensor) -> Tensor:
        pixels = (0.5 + latents.flatten(1) / (2 * self.extent)).clamp(0, 1)
        size = math.prod(self.image_shape)
        return F.pad(pixels, (0, size - self.dimension), value=0.5).reshape(-1, *self.image_shape)

    @override
    def encode(self, images: Tensor) -> Tensor:
        return self.positions(images)[:, :, None, None]

    @override
    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        save_lora(denoiser, folder)

    @override
    def load_lora(self, denoiser: nn.Module, folder: Path) -> None:
        load_lora(denoiser, folder)


def write_mixture(
    folder: str | os.PathLike[str],
    means: Sequence[Sequence[float]],
    *,
    stds: Sequence[float],
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    scheduler: Mapping[str, Any] = _DDPM,
    width: int = 64,
    seed: int = 0,
) -> Path:
    """Write a mixture as a folder that `load_model` and `gym.make(model=…)` open; return the folder.

    Args:
        folder: The folder to write to.
        means: [K][d] the components' means.
        stds: [K] their standard deviations, positive.
        names: [K] the words that prompts call them by; not "anything", without " and ".
        weights: [K] their weights, positive; None: all the same.
        scheduler: The process, in the words of diffusers' `DDIMScheduler`. With `set_alpha_to_one` (its default) the
            last step goes to the clean end: no density, so no policy gradient reaches it. `trained_betas` makes any
            process; {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0} a rectified flow, in the words of
            that class; {"_class_name": "EDMEulerScheduler"} a variance-exploding one, with Karras' levels.
        width: The hidden layers' width of the network that is trained.
        seed: The seed of that network's first weights; its last layer is zero.

    Raises:
        ValueError: the lists do not fit each other, or a value is out of its range.
    """
    weights = [1.0] * len(means) if weights is None else list(weights)
    if not means or not len(means) == len(stds) == len(names) == len(weights) or len({len(row) for row in means}) != 1:
        raise ValueError(
            "means must be K rows of one length, and stds, names and weights K each; got "
            f"{[len(row) for row in means]}, {len(stds)}, {len(names)} and {len(weights)}"
        )
    if len(set(names)) != len(names) or any(name in (ANYTHING, "") or " and " in name for name in names):
        raise ValueError(f'names must differ, not be "{ANYTHING}", and not contain " and "; got {list(names)}')
    folder = Path(folder)
    settings = {key: value for key, value in scheduler.items() if key != "_class_name"}
    is_flow = scheduler.get("_class_name") == FLOW
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = MixtureDenoiser(
            [list(map(float, row)) for row in means], list(stds), weights, width, "flow" if is_flow else "epsilon"
        )
    denoiser.save_pretrained(folder / MixtureModel.denoiser_folder)
    if scheduler.get("_class_name") == KARRAS:
        EDMEulerScheduler(**{"prediction_type": "epsilon", **settings}).save_pretrained(folder / "scheduler")
    elif is_flow:
        FlowMatchEulerDiscreteScheduler(**settings).save_pretrained(folder / "scheduler")
    else:
        betas = scheduler.get("trained_betas")
        steps = {} if betas is None else {"num_train_timesteps": len(betas)}
        DDIMScheduler(**{**steps, **settings}).save_pretrained(folder / "scheduler")
    index = {"_class_name": "MixturePipeline", "names": list(names)}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder
