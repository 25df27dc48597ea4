"""The denoising network as a policy: π(x_s | s) = p_θ(x_s | x_t, prompt)."""

import contextlib
import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from gymnasium.spaces import Dict, Space
from peft import LoraConfig
from torch import Tensor, nn

from diffusion_gym.models.base import Conditioning, DiffusionModel, Prediction, checked_guidance_scale, load_model
from diffusion_gym.models.weights import is_same_sample, read_weights, require_weights, sample_weights
from diffusion_gym.predictions import broadcast_to, to_x0_and_epsilon
from diffusion_gym.transitions import GaussianTransition, ddim_scales, ddim_transition

from .base import Observation, Policy, Shape, read_config, write_config

MixedPrecision = Literal["no", "fp16", "bf16"]

_OF_TIME = {"latents", "timestep", "next_timestep", "prompt_id"}
_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def _own_copy(denoiser: nn.Module, lora: LoraConfig | None, trained: Sequence[str] | None) -> nn.Module:
    """Return a copy to train, in float32: all of it, or some weights; or LoRA layers over the shared frozen tensors."""
    if lora is None:
        own = copy.deepcopy(denoiser).float()
        for name, parameter in own.named_parameters():
            parameter.requires_grad_(trained is None or any(part in name for part in trained))
        return own
    shared = copy.deepcopy(denoiser, memo={id(tensor): tensor for tensor in denoiser.parameters()})
    with torch.random.fork_rng(devices=[]):  # peft draws first weights, which `_start_lora` replaces
        shared.add_adapter(lora)  # type: ignore[operator]
    for parameter in shared.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return shared


@torch.no_grad()
def _start_lora(denoiser: nn.Module, generator: torch.Generator) -> None:
    """Draw LoRA's first weights as peft does, but from a generator of one's own."""
    for name, parameter in denoiser.named_parameters():
        if "lora_A" in name:
            drawn = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))


class DenoisingPolicy(Policy):
    """The actor of the denoising MDP: the model's own sampler, with the denoiser as its parameters.

    π(x_s | x_t, prompt) = N(mean, std²) of DDIM's step with `eta`, from the guided prediction of the policy's own
    denoiser (see `diffusion_gym.transitions.ddim_transition`). The log-prob is that of the *guided* policy.

    Source: Black et al., 2023, section 4.3, https://arxiv.org/abs/2305.13301.

    Args:
        model: The diffusion model, usually `env.unwrapped.model`; its frozen weights are never changed.
        eta: DDIM's η in (0, 1]: the share of DDPM's noise. 0 samples deterministically and cannot be trained.
        guidance_scale: Classifier-free guidance; None: the model's default (5; emoji 4).
        use_lora: Train LoRA layers over the frozen denoiser instead of a full copy of it.
        lora_rank: LoRA's rank (ddpo-pytorch: 4).
        lora_alpha: LoRA's scale; None: the rank.
        lora_targets: Names of the layers that LoRA adapts; None: the model's attention projections.
        trained: Train only the weights whose names contain one of these, such as ("bias", "norm", "time_emb"); None:
            all. Not with LoRA.
        mixed_precision: Precision of the denoiser's arithmetic: "no" (that of its weights), "fp16" or "bf16"
            (autocast). Trained weights, distributions and log-probs are float32 in any case. With "fp16" the
            algorithms scale the loss, or small gradients would vanish; "bf16" has no such limit.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        train_cfg: ddpo-pytorch's switch. False scores without guidance, when gradients are on, what was sampled with
            guidance. The ratio is then not 1 before the first update; to sample and train without guidance use
            `guidance_scale=1`.
        prompts: The environment's prompts, needed only where its observations carry no embeddings.
        negative_prompt: The environment's negative prompt, likewise.
        seed: Seeds the policy's own generator, and LoRA's first layer.

    Raises:
        ValueError, TypeError: an argument is out of its range or of the wrong kind.
    """

    _window: tuple[float, float] | None = None

    def __init__(
        self,
        model: DiffusionModel,
        *,
        eta: float = 1.0,
        guidance_scale: float | None = None,
        use_lora: bool = False,
        lora_rank: int = 4,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] | None = None,
        trained: Sequence[str] | None = None,
        mixed_precision: MixedPrecision = "no",
        gradient_checkpointing: bool = False,
        train_cfg: bool = True,
        prompts: Sequence[str] = (),
        negative_prompt: str = "",
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        if not isinstance(model, DiffusionModel):
            raise TypeError(f"model must be a DiffusionModel, such as env.unwrapped.model; got {type(model).__name__}")
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a sequence of texts, such as env.unwrapped.prompts; got {prompts!r}")
        if isinstance(lora_targets, str):
            raise TypeError(
                f"lora_targets must be a sequence of names, such as ({lora_targets!r},); got {lora_targets!r}"
            )
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        if isinstance(trained, str) or (trained is not None and use_lora):
            raise ValueError(f"trained must be a sequence of parts of names, and None with use_lora; got {trained!r}")
        if not use_lora and (lora_rank, lora_alpha, lora_targets) != (4, None, None):
            raise ValueError(
                "lora_rank, lora_alpha and lora_targets need use_lora=True, "
                f"got {lora_rank}, {lora_alpha} and {lora_targets} without it"
            )
        if negative_prompt and not prompts:
            raise ValueError(
                f"negative_prompt={negative_prompt!r} has no effect: it needs prompts, to be looked up with"
            )
        scale = checked_guidance_scale(model.default_guidance_scale if guidance_scale is None else guidance_scale)
        if not train_cfg and scale <= 1:
            raise ValueError(f"train_cfg=False has no effect: it needs a guidance_scale above 1, got {scale}")
        if mixed_precision not in get_args(MixedPrecision):
            raise ValueError(f"mixed_precision must be one of {get_args(MixedPrecision)}, got {mixed_precision!r}")
        if mixed_precision != "no" and model.dtype not in (torch.float32, _AUTOCAST[mixed_precision]):
            raise ValueError(
                f"mixed_precision={mixed_precision!r} does not go with a model in {model.dtype}: load the model with "
                f'dtype="float32" or in {_AUTOCAST[mixed_precision]}, or give mixed_precision="no"'
            )
        if use_lora and not (lora_alpha is None or 0 < lora_alpha < math.inf):
            raise ValueError(f"lora_alpha must be None, or positive and finite; got {lora_alpha}")
        self.model = model
        self.eta = eta
        self.guidance_scale = scale
        self.use_lora = use_lora
        self.lora_rank = lora_rank
        self.lora_alpha = lora_rank if lora_alpha is None else lora_alpha
        self.lora_targets = tuple(lora_targets or model.lora_targets)
        self.trained = None if trained is None else tuple(trained)
        self.mixed_precision: MixedPrecision = mixed_precision
        self.gradient_checkpointing = gradient_checkpointing
        self.train_cfg = train_cfg
        self.prompts = tuple(prompts)
        self.negative_prompt = negative_prompt
        self.device = model.device
        config = LoraConfig(r=lora_rank, lora_alpha=self.lora_alpha, target_modules=list(self.lora_targets))
        self.denoiser = _own_copy(model.denoiser, config if use_lora else None, self.trained).eval()
        if use_lora:
            _start_lora(self.denoiser, torch.Generator().manual_seed(self.generator.initial_seed()))
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        self._choose_attention(self.denoiser)

    def _choose_attention(self, denoiser: nn.Module) -> None:
        if self.device.type == "cpu" and self.mixed_precision == "bf16" and hasattr(denoiser, "set_attn_processor"):
            # The fused attention's bf16 backward on CPUs took a third of a training step: 1.17 s against 0.93 s.
            denoiser.set_attn_processor(AttnProcessor())  # type: ignore[operator]

    def reference(self) -> "DenoisingPolicy":
        """Return the untrained policy, frozen: the model's own denoiser in the place of the trained one.

        It shares the model's weights, so it costs no memory and is the same after `load`. Only where a float32 copy is
        trained of weights of lower precision, it is such a copy too.
        """
        frozen = self.model.denoiser
        is_copy = not self.use_lora and self.model.dtype != torch.float32
        denoiser = copy.deepcopy(frozen, {} if is_copy else {id(tensor): tensor for tensor in frozen.parameters()})
        self._choose_attention(denoiser)
        memo = {id(self.model): self.model, id(self.denoiser): denoiser.float() if is_copy else denoiser}
        return copy.deepcopy(self, memo)

    def distribution(self, observation: Observation) -> GaussianTransition:
        """Return p_θ(x_s | x_t, prompt) for observations of the denoising MDP: one pass through the denoiser."""
        t, s = observation["timestep"][:, 0], observation["next_timestep"][:, 0]
        guided = self.train_cfg or not torch.is_grad_enabled()
        with self._autocast():
            prediction = self.model.denoise(
                observation["latents"],
                t,
                self._conditioning(observation),
                guidance_scale=self.guidance_scale if guided else 1.0,
                denoiser=self.denoiser,
            )
        return ddim_transition(
            prediction.x0, prediction.epsilon, schedule=self.model.schedule, t=t, s=s, eta=self._eta_at(t)
        )

    def sensitivity(self, t: Tensor, s: Tensor) -> Tensor:
        """Return by how many standard deviations a step's mean moves when the denoiser's output moves by 1, [...].

        ∇log π(x_s | x_t) of a draw is this times unit noise times the denoiser's own gradient: how loud a step is. On
        grids of DDPM it is mostly 1 to 2, but far larger where σ shrinks a lot in one step (9 in the last but one of
        Stable Diffusion's 10). Infinite where the step is deterministic.

        Args:
            t: [...] current times.
            s: [...] next times.
        """
        schedule = self.model.schedule
        pred_x0, pred_epsilon = to_x0_and_epsilon(
            torch.ones_like(t),
            torch.zeros_like(t),
            alpha=schedule.alpha(t),
            sigma=schedule.sigma(t),
            prediction_type=self.model.prediction_type,
        )
        x0_scale, epsilon_scale, std = ddim_scales(schedule, t, s, eta=self._eta_at(t))
        moved = (x0_scale * pred_x0 + epsilon_scale * pred_epsilon).abs()
        return torch.where(std > 0, moved / std, torch.inf)

    def predict_noised(self, clean: Tensor, t: Tensor, noise: Tensor, constants: Observation) -> Prediction:
        """Return the guided prediction for noised clean latents, α_t·x_0 + σ_t·ε: what regression compares with them.

        Args:
            clean: [B, C, H, W] x_0.
            t: [B] the times.
            noise: [B, C, H, W] ε.
            constants: [B, ...] what is observed of the prompts: embeddings, or their indices.
        """
        schedule = self.model.schedule
        alpha, sigma = (broadcast_to(level(t), clean) for level in (schedule.alpha, schedule.sigma))
        with self._autocast():
            return self.model.denoise(
                alpha * clean + sigma * noise,
                t,
                self._conditioning(constants),
                guidance_scale=self.guidance_scale if self.train_cfg else 1.0,
                denoiser=self.denoiser,
            )

    @property
    def needed_shapes(self) -> Mapping[str, Shape]:
        """The model's latents, observed between two times and as the action."""
        latents = self.model.latent_shape
        return {"latents": latents, "timestep": (1,), "next_timestep": (1,), "action": latents}

    @property
    def needs_loss_scaling(self) -> bool:
        """Whether the arithmetic is in fp16: by autocast, or because LoRA's frozen weights are."""
        if self.mixed_precision == "no":
            return self.use_lora and self.model.dtype == torch.float16
        return self.mixed_precision == "fp16"

    def action_dtype(self, observation: Observation) -> torch.dtype:
        """Return the latents' precision."""
        return observation["latents"].dtype

    def scored(self, info: Mapping[str, object]) -> np.ndarray:
        """Return which lanes' next step is stochastic: not for η = 0, nor for the step to the clean end."""
        t, s = (torch.as_tensor(info[key], dtype=torch.float64) for key in ("timestep", "next_timestep"))
        return (ddim_scales(self.model.schedule, t, s, eta=self._eta_at(t))[2] > 0).numpy()

    def windowed(self, noisy: float, clean: float) -> "DenoisingPolicy":
        """Return this policy with η = 0 outside a window: steps from a time t with clean < t ≤ noisy stay as they are.

        It is another view of the same denoiser and generator; this policy itself does not change. In the window both
        have the same distributions, to the last bit.
        """
        view = copy.copy(self)
        view._window = (noisy, clean)
        return view

    def _eta_at(self, t: Tensor) -> float | Tensor:
        if self.eta == 0:
            return 0.0
        eta = torch.full_like(t, self.eta)
        return eta if self._window is None else eta * ((t <= self._window[0]) & (t > self._window[1]))

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.mixed_precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST[self.mixed_precision])

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
        table = self.model.encode_prompts(self.prompts, self.negative_prompt)
        index = observation["prompt_id"][:, 0]
        outside = index < 0  # not of the prompt set: they have no row, and the environment refuses what comes of NaN
        return {
            key: value[index].masked_fill(outside.reshape(-1, *[1] * (value.ndim - 1)), torch.nan)
            for key, value in table.items()
        }

    # ------------------------------------------------------------------ files
    def save(self, folder: Path) -> None:
        """Write the trained weights: `unet/` in diffusers' format, or a LoRA file for `load_lora_weights`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_further(folder, "denoiser")
        if self.use_lora:
            self.model.save_lora(self.denoiser, folder)
        else:
            self.denoiser.save_pretrained(folder / self.model.denoiser_folder)  # type: ignore[operator]
        write_config(
            folder,
            self,
            model={
                "source": self.model.source,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "image_size": self.model.image_shape[1],
                "revision": self.model.revision,
                "variant": self.model.variant,
                "sample": sample_weights(self.model.denoiser),
            },
            eta=self.eta,
            guidance_scale=self.guidance_scale,
            use_lora=self.use_lora,
            lora_rank=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_targets=self.lora_targets,
            trained=self.trained,
            mixed_precision=self.mixed_precision,
            gradient_checkpointing=self.gradient_checkpointing,
            train_cfg=self.train_cfg,
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
        for key in ("use_lora", "lora_rank", "lora_alpha", "lora_targets") if self.use_lora else ("use_lora",):
            own = getattr(self, key)
            if config[key] != (list(own) if isinstance(own, tuple) else own):
                raise ValueError(f"{folder} was saved with {key}={config[key]!r}, this policy has {own!r}")
        origin = config["model"]
        if self.use_lora:
            self.model.load_lora(self.denoiser, folder)
        else:
            weights, own = folder / self.model.denoiser_folder, self.denoiser.state_dict()
            owner = f"a policy of the model {self.model.source!r}"
            saved_from = f"; it was saved from one of {origin['source']!r}"
            found = read_weights(weights) if weights.is_dir() else {}
            require_weights(found, own, file=weights, owner=owner, origin=saved_from)
            self.denoiser.load_state_dict(found)
        self._load_further(folder, "denoiser")
        is_rounded = origin["dtype"] != str(self.model.dtype).removeprefix("torch.")
        sample = sample_weights(self.model.denoiser)
        if not is_same_sample(origin.get("sample", sample), sample, is_rounded=is_rounded):
            warnings.warn(
                f"{folder} was trained on a model ({origin['source']!r}) whose denoiser has other weights than that of "
                f"{self.model.source!r} here: "
                + ("its LoRA layers mean something else here" if self.use_lora else "its gain is over another one"),
                stacklevel=3,
            )

    @classmethod
    def load(
        cls, folder: Path | str, model: DiffusionModel | None = None, device: str | torch.device = "cpu"
    ) -> "DenoisingPolicy":
        """Return the policy that `save` wrote, on `model` or on the one that it was made from."""
        config = read_config(Path(folder), cls)
        source = config.pop("model")
        source.pop("sample", None)
        if not config["use_lora"]:  # they are saved as LoRA would have had them
            config = {key: value for key, value in config.items() if not key.startswith("lora_")}
        policy = cls(model or load_model(source.pop("source"), device=device, **source), **config)
        policy.load_weights(Path(folder))
        return policy
