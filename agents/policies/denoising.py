"""The denoising network as a policy: π(x_s | s) = p_θ(x_s | x_t, prompt)."""

import contextlib
import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from gymnasium.spaces import Dict, Space
from torch import Tensor

from diffusion_gym.models.base import Conditioning, DiffusionModel, Prediction
from diffusion_gym.models.loading import load_model
from diffusion_gym.models.weights import is_same_sample
from diffusion_gym.parts import described, made
from diffusion_gym.precision import has_fast_bf16
from diffusion_gym.predictions import broadcast_to
from diffusion_gym.samplers import Sampler, Windowed
from diffusion_gym.transitions import GaussianTransition, transition

from .adaptation import Adaptation, Full
from .base import Observation, Policy, Shape, read_config, write_config

Precision = Literal["fp16", "bf16"]

_OF_TIME = {"latents", "timestep", "next_timestep", "prompt_id"}
_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}


class DenoisingPolicy(Policy):
    """The actor of the denoising MDP: a sampler's steps, with the denoiser as the parameters.

    π(x_s | x_t, prompt) is the sampler's step from the guided prediction of the policy's own denoiser (see
    `diffusion_gym.transitions`). The log-prob is that of the *guided* policy.

    Source: Black et al., 2023, section 4.3, https://arxiv.org/abs/2305.13301.

    Args:
        model: The diffusion model, usually `env.unwrapped.model`; its frozen weights are never changed.
        sampler: How the next latents are drawn from a prediction; None: the model's default, usually `DDIM(eta=1)`. A
            deterministic one, such as `DDIM(eta=0)`, has no log-probs, so only regression (RWR, NFT) trains with it.
        adaptation: What is trained of the denoiser: `Full()`, `Only(…)` or `LoRA(…)`.
        guidance_scale: Classifier-free guidance; None: the model's default (5; emoji 4).
        precision: Precision of the denoiser's arithmetic, by autocast: "fp16" or "bf16"; None: that of its weights;
            "auto": "bf16" for float32 weights where the device has instructions for it, and otherwise None.
            Trained weights, distributions and log-probs are float32 in any case. With "fp16" the algorithms scale the
            loss, or small gradients would vanish; "bf16" has no such limit.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        prompts: The environment's prompts, needed only where its observations carry no embeddings.
        negative_prompt: The environment's negative prompt, likewise.
        seed: Seeds the policy's own generator, and LoRA's first layer.

    Raises:
        ValueError, TypeError: an argument is out of its range or of the wrong kind.
    """

    moves_latents = True
    reference_is_free = True
    model: DiffusionModel

    def __init__(
        self,
        model: DiffusionModel,
        *,
        sampler: Sampler | None = None,
        adaptation: Adaptation = Full(),
        guidance_scale: float | None = None,
        precision: Precision | Literal["auto"] | None = None,
        gradient_checkpointing: bool = False,
        prompts: Sequence[str] = (),
        negative_prompt: str = "",
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        if not isinstance(model, DiffusionModel):
            raise TypeError(f"model must be a DiffusionModel, such as env.unwrapped.model; got {type(model).__name__}")
        sampler = model.default_sampler if sampler is None else sampler
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be a Sampler, such as DDIM(eta=1.0); got {sampler!r}")
        if not isinstance(adaptation, Adaptation):
            raise TypeError(f"adaptation must be an Adaptation, such as LoRA(rank=4); got {adaptation!r}")
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a sequence of texts, such as env.unwrapped.prompts; got {prompts!r}")
        if negative_prompt and not prompts:
            raise ValueError(
                f"negative_prompt={negative_prompt!r} has no effect: it needs prompts, to be looked up with"
            )
        precision = _resolved_precision(precision, model)
        sampler.scales(model.schedule, *torch.zeros(2, 0))  # says whether it is one of this process
        self.model = model
        self.sampler = sampler
        self.adaptation = adaptation.resolved(model)
        self.guidance_scale = model.guidance_scale_of(guidance_scale)
        self.precision = precision
        self.gradient_checkpointing = gradient_checkpointing
        self.prompts = tuple(prompts)
        self.negative_prompt = negative_prompt
        self.device = model.device
        self.denoiser = self.adaptation.network(
            model, torch.Generator().manual_seed(self.generator.initial_seed())
        ).eval()
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        model.use_training_attention(self.denoiser, bf16=precision == "bf16")

    def distribution(self, observation: Observation) -> GaussianTransition:
        """The policy p_θ(x_s | x_t, prompt) for observations of the denoising MDP: one pass through the denoiser."""
        t, s = observation["timestep"][:, 0], observation["next_timestep"][:, 0]
        prediction = self._predict(observation["latents"], t, observation, guidance_scale=self.guidance_scale)
        return transition(prediction.x0, prediction.epsilon, self.sampler.scales(self.model.schedule, t, s))

    def predict_noised(
        self, clean: Tensor, t: Tensor, noise: Tensor, constants: Observation, *, guidance_scale: float | None = None
    ) -> Prediction:
        """The prediction for noised clean latents, α_t·x_0 + σ_t·ε: what regression compares with them.

        Args:
            clean: [B, C, H, W] x_0.
            t: [B] the times.
            noise: [B, C, H, W] ε.
            constants: [B, ...] what is observed of the prompts: embeddings, or their indices.
            guidance_scale: Classifier-free guidance, 1 for none; None: the policy's.
        """
        schedule = self.model.schedule
        alpha, sigma = (broadcast_to(level(t), clean) for level in (schedule.alpha, schedule.sigma))
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return self._predict(alpha * clean + sigma * noise, t, constants, guidance_scale=scale)

    def _predict(self, latents: Tensor, t: Tensor, observation: Observation, *, guidance_scale: float) -> Prediction:
        with self._autocast():
            return self.model.denoise(
                latents,
                t,
                self._conditioning(observation),
                guidance_scale=guidance_scale,
                denoiser=self.denoiser,
            )

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision is None:
            return contextlib.nullcontext()
        # The cache would keep a copy of every layer that a divided network gathers, until the end of the pass.
        return torch.autocast(
            self.device.type, _DTYPE[self.precision], cache_enabled=False if self.model.is_sharded else None
        )

    def sensitivity(self, t: Tensor, s: Tensor) -> Tensor:
        """By how many standard deviations a step's mean moves when the denoiser's output moves by 1, [...].

        ∇log π(x_s | x_t) of a draw is this times unit noise times the denoiser's own gradient: how loud a step is. On
        grids of DDPM it is mostly 1 to 2, but far larger where σ shrinks a lot in one step (9 in the last but one of
        Stable Diffusion's 10). Infinite where the step is deterministic.

        Args:
            t: [...] current times.
            s: [...] next times.
        """
        pred_x0, pred_epsilon = self.model.to_x0_and_epsilon(torch.ones_like(t), torch.zeros_like(t), t)
        scales = self.sampler.scales(self.model.schedule, t, s)
        moved = (scales.x0 * pred_x0 + scales.epsilon * pred_epsilon).abs()
        return torch.where(scales.std > 0, moved / scales.std, torch.inf)

    def scored(self, info: Mapping[str, object]) -> np.ndarray:
        """Which lanes' next step is stochastic, [B] bool; DDIM's to the clean end is not."""
        t, s = (torch.as_tensor(info[key], dtype=torch.float64) for key in ("timestep", "next_timestep"))
        return (self.sampler.scales(self.model.schedule, t, s).std > 0).numpy()

    def windowed(self, noisy: float, clean: float) -> "DenoisingPolicy":
        """This policy with deterministic steps outside a window: from a time t with clean < t ≤ noisy they stay.

        It is another view of the same denoiser and generator; this policy itself does not change. In the window both
        have the same distributions, to the last bit.
        """
        view = copy.copy(self)
        view.sampler = Windowed(self.sampler, noisy, clean)
        return view

    def reference(self) -> "DenoisingPolicy":
        """The untrained policy, frozen: the model's own denoiser in the place of the trained one.

        It shares the model's weights, so it costs no memory and is the same after `load`. Only where a float32 copy is
        trained of weights of lower precision, it is such a copy too.
        """
        denoiser = self.adaptation.reference(self.model)
        self.model.use_training_attention(denoiser, bf16=self.precision == "bf16")
        return copy.deepcopy(self, {id(self.model): self.model, id(self.denoiser): denoiser})

    @property
    def needed_shapes(self) -> Mapping[str, Shape]:
        """The model's latents, observed between two times and as the action."""
        latents = self.model.latent_shape
        return {"latents": latents, "timestep": (1,), "next_timestep": (1,), "action": latents}

    @property
    def needs_loss_scaling(self) -> bool:
        """Whether the arithmetic is in fp16: by autocast, or because LoRA's frozen weights are."""
        dtype = _DTYPE[self.precision] if self.precision else self.adaptation.arithmetic(self.model)
        return dtype == torch.float16

    def action_dtype(self, observation: Observation) -> torch.dtype:
        """The latents' precision."""
        return observation["latents"].dtype

    def check_prompts(self, observation_space: Space, prompts: Sequence[str], negative_prompt: str) -> None:
        """Raise ValueError if prompts are looked up here, and are not the environment's in its order, or none."""
        observed = set(observation_space) if isinstance(observation_space, Dict) else set()
        if not observed - _OF_TIME and (list(self.prompts) != list(prompts) or self.negative_prompt != negative_prompt):
            raise ValueError(
                "the observations carry no embeddings, and the policy's prompts are not those that the environment "
                "counts: make the policy with prompts=env.unwrapped.prompts.texts and the environment's "
                f"negative_prompt={negative_prompt!r}, or the environment with observe_embeds=True"
            )

    def _conditioning(self, observation: Observation) -> Conditioning:
        embeds = {key: value for key, value in observation.items() if key not in _OF_TIME}
        if embeds:
            return embeds
        if not self.prompts:
            raise ValueError(
                "the observation has no embeddings: make the environment with observe_embeds=True, or give the policy "
                "its prompts (and negative_prompt)"
            )
        table = self.model.prompt_table(self.prompts, self.negative_prompt)
        index = observation["prompt_id"][:, 0]
        outside = index < 0  # not of the prompt set: they have no row, and the environment refuses what comes of NaN
        return {
            key: value[index].masked_fill_(outside.reshape(-1, *[1] * (value.ndim - 1)), torch.nan)
            for key, value in table.items()
        }

    def save(self, folder: Path) -> None:
        """Write the trained weights: `unet/` in diffusers' format, or a LoRA file for `load_lora_weights`.

        Processes that share weights which are trained (all or `Only` some, not LoRA's) have to call it all.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_further(folder, "denoiser")
        self.adaptation.save(self.denoiser, folder, model=self.model)
        write_config(
            folder,
            self,
            model={
                "source": self.model.source,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "image_size": list(self.model.image_size),
                "revision": self.model.revision,
                "variant": self.model.variant,
                "without": list(self.model.without),
                "text_encoder_dtype": str(self.model.text_encoder_dtype).removeprefix("torch."),
                "sample": self.model.sample_weights(),
            },
            sampler=described(self.sampler),
            adaptation=described(self.adaptation),
            guidance_scale=self.guidance_scale,
            precision=self.precision,
            gradient_checkpointing=self.gradient_checkpointing,
            prompts=self.prompts,
            negative_prompt=self.negative_prompt,
        )

    def load_weights(self, folder: Path) -> None:
        """Read what `save` wrote into this policy's denoiser.

        Raises:
            FileNotFoundError: the folder is not a saved policy.
            ValueError: its weights are not all there, of another shape, NaN or infinite, or a file is damaged.
        """
        folder = Path(folder)
        config = read_config(folder, type(self))
        saved, origin = made(config["adaptation"], Adaptation), config["model"]
        if not self.adaptation.reads(saved):
            raise ValueError(f"{folder} was saved with adaptation={saved}, this policy has {self.adaptation}")
        self.adaptation.load(self.denoiser, folder, model=self.model, trained_on=origin["source"])
        self._load_further(folder, "denoiser")
        is_rounded = origin["dtype"] != str(self.model.dtype).removeprefix("torch.")
        sample = self.model.sample_weights()
        if not is_same_sample(origin.get("sample", sample), sample, is_rounded=is_rounded):
            warnings.warn(
                f"{folder} was trained on a model ({origin['source']!r}) whose denoiser has other weights than that of "
                f"{self.model.source!r} here: {self.adaptation.over_another_model}",
                stacklevel=3,
            )

    @classmethod
    def load(
        cls, folder: Path | str, model: DiffusionModel | None = None, device: str | torch.device = "cpu"
    ) -> "DenoisingPolicy":
        """The policy that `save` wrote, on `model` or on the one that it was made from."""
        config = read_config(Path(folder), cls)
        source = config.pop("model")
        source.pop("sample", None)
        parts = {"sampler": made(config["sampler"], Sampler), "adaptation": made(config["adaptation"], Adaptation)}
        policy = cls(model or load_model(source.pop("source"), device=device, **source), **{**config, **parts})
        policy.load_weights(Path(folder))
        return policy


def _resolved_precision(precision: Precision | Literal["auto"] | None, model: DiffusionModel) -> Precision | None:
    """Return what "auto" stands for; raise ValueError for what is no precision or not one for the model's weights."""
    if precision is None:
        return None
    if precision == "auto":
        return "bf16" if model.dtype == torch.float32 and has_fast_bf16(model.device) else None
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be None, 'auto' or one of {get_args(Precision)}, got {precision!r}")
    if model.dtype not in (torch.float32, _DTYPE[precision]):
        raise ValueError(
            f"precision={precision!r} does not go with a model in {model.dtype}: load the model with "
            f'dtype="float32" or in {_DTYPE[precision]}, or give precision=None'
        )
    return precision
