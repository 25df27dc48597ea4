"""Latent consistency models (LCM): Stable Diffusion distilled into a few steps, by a UNet that is told the guidance."""

import json
import os
import shutil
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from typing_extensions import override

from ..consistency_function import latent_scalings
from ..predictions import broadcast_to
from ..samplers import Consistency
from ..transfer import to_device
from .base import Conditioning, ImageSize
from .folders import read_config
from .schedulers import consistency_schedule
from .stable_diffusion import StableDiffusionModel
from .understood import LCM_UNET


def guidance_embedding(guidance_scale: float, size: int) -> Tensor:
    """Return what a UNet is told of the guidance scale, [size] float32, on the CPU: sines and cosines of 1000·(w − 1).

    Source: diffusers' `LatentConsistencyModelPipeline.get_guidance_scale_embedding`, in its order of operations: at
    angles of thousands another order shows.

    Args:
        guidance_scale: w as of classifier-free guidance: 1 is none.
        size: The length, at least 4.
    """
    half = size // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = torch.tensor(guidance_scale - 1) * 1000.0 * frequencies
    return F.pad(torch.cat([torch.sin(angles), torch.cos(angles)]), (0, size % 2))


class LatentConsistencyModel(StableDiffusionModel):
    """A `LatentConsistencyModelPipeline` folder, such as LCM_Dreamshaper_v7.

    Its prediction of x_0 is the consistency function f, with the noise that goes with it, (x_t − α_t·f)/σ_t:

        f = c_skip·x_t + c_out·x̂_0    c_skip = σ_d²/((κt)² + σ_d²)    c_out = κt/√((κt)² + σ_d²)

    with the x̂_0 of the UNet's output, σ_d = ½ and the folder's `timestep_scaling` κ (10); at t = 0 it is x_t. The
    default sampler draws all noise of the next time anew; the last action is f, a step without density.

    The UNet is told the guidance scale, so that a step is one pass, and there is no negative prompt.

    Source: Luo et al., 2023, "Latent Consistency Models", https://arxiv.org/abs/2310.04378.
    """

    components: ClassVar = {**StableDiffusionModel.components, "scheduler": ("LCMScheduler",)}
    guidance = "embedded"
    default_guidance_scale = 8.5
    default_sampler = Consistency()
    boundary_time = 0.0
    guidance_layers = ("time_embedding.cond_proj",)

    def _examine(self, image_size: ImageSize | None) -> None:
        unet = self._examine_networks(LCM_UNET, image_size)
        self._guidance_size = unet.config.time_cond_proj_dim
        self.schedule, self.prediction_type, self._timestep_scaling = consistency_schedule(self.path / "scheduler")

    @override
    def to_x0_and_epsilon(self, model_output: Tensor, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        pred_x0, _ = super().to_x0_and_epsilon(model_output, latents, t)
        c_skip, c_out = latent_scalings(t, timestep_scaling=self._timestep_scaling)
        consistent = broadcast_to(c_skip, latents) * latents + broadcast_to(c_out, latents) * pred_x0
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        sigma = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)  # 0 at the clean end, where the noise is 0 too
        return consistent, (latents - broadcast_to(alpha, latents) * consistent) / broadcast_to(sigma, latents)

    @override
    def _model_output(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        dtype = next(network.parameters()).dtype
        told = to_device(guidance_embedding(guidance_scale, self._guidance_size), latents.device)
        return network(
            latents.to(dtype),
            t,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            timestep_cond=told.to(dtype).expand(len(latents), -1),
            return_dict=False,
        )[0]


def write_latent_consistency(
    folder: str | os.PathLike[str],
    model: StableDiffusionModel,
    *,
    num_train_timesteps: int | None = None,
    original_steps: int = 50,
    guidance_size: int = 256,
) -> Path:
    """Write the folder of a latent consistency model that starts as a diffusion model, to be distilled; return it.

    It is a whole `LatentConsistencyModelPipeline`. Its UNet has the model's weights, and is told the guidance scale by
    a layer of zeros: it has no effect until it is trained. What the UNet predicts stays what it was.

    Args:
        folder: The folder to write to.
        model: A model of a `StableDiffusionPipeline`.
        num_train_timesteps: The number of the process's first indices that are kept: samples then start, from pure
            noise, at the last of them. For a UNet that predicts ε, x̂_0 = (x_t − σ_t·ε̂)/α_t is a poor f where α_t is
            small: errors are multiplied by 12 at index 800 of Stable Diffusion 2's process and by 66 at 999. None: all.
        original_steps: K, the number of times at which it is distilled; see `LatentConsistencySchedule`.
        guidance_size: The length of the guidance scale's embedding, at least 4.

    Raises:
        TypeError: `model` is none of Stable Diffusion, or has a guidance embedding already.
        ValueError: there are not as many indices, or fewer of them than `original_steps`.
    """
    if not isinstance(model, StableDiffusionModel) or isinstance(model, LatentConsistencyModel):
        raise TypeError(f"the model must be one of a StableDiffusionPipeline, got a {type(model).__name__}")
    settings = read_config(model.path / "scheduler" / "scheduler_config.json")
    betas = LCMScheduler.from_config(settings).betas.tolist()
    folder, total = Path(folder), len(betas)
    count = total if num_train_timesteps is None else num_train_timesteps
    if not original_steps <= count <= total:
        raise ValueError(f"num_train_timesteps must be between {original_steps} (K) and {total}, got {count}")
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(model.path / part, folder / part, dirs_exist_ok=True)
    config = read_config(model.path / "unet" / "config.json")
    network = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": guidance_size})
    network.load_state_dict(model.denoiser.state_dict(), strict=False)
    nn.init.zeros_(network.time_embedding.cond_proj.weight)
    network.register_to_config(_name_or_path="")
    network.save_pretrained(folder / "unet")
    LCMScheduler(
        num_train_timesteps=count,
        trained_betas=betas[:count],
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=model.prediction_type,
        original_inference_steps=original_steps,
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "LatentConsistencyModelPipeline",
        **{
            name: ["transformers" if name in ("text_encoder", "tokenizer") else "diffusers", classes[0]]
            for name, classes in LatentConsistencyModel.components.items()
        },
        **{name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")},
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder
