"""Consistency models in pixels, without a text: of no classes, or of numbered ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from typing_extensions import override

from ..consistency_function import ve_scalings
from ..naming import unknown_name
from ..predictions import broadcast_to
from ..samplers import Consistency
from .base import Conditioning, ImageSize, as_image_size
from .pipeline import PipelineModel
from .schedulers import variance_exploding_consistency
from .stable_diffusion import sample_size
from .understood import PIXEL_UNET

_ANYTHING = "anything"


class ConsistencyModel(PipelineModel):
    """A `ConsistencyModelPipeline` folder, such as openai/diffusers-cd_imagenet64_l2.

    Its prediction of x_0 is the consistency function f, of a variance-exploding process of images in [−1, 1]:

        f = c_skip·x + c_out·F(c_in·x, 250·ln t)    (see `diffusion_gym.consistency_function.ve_scalings`)

    The prompt is the number of a class, "0", "1" …; a model without classes has one prompt, "anything". If the
    folder's scheduler clips f to [−1, 1], so does this: for training, write `"clip_denoised": false` there.

    Source: Song et al., 2023, "Consistency Models", https://arxiv.org/abs/2303.01469.
    """

    components: ClassVar = {"unet": ("UNet2DModel",), "scheduler": ("CMStochasticIterativeScheduler",)}
    network = UNet2DModel
    denoiser_folder = "unet"
    feature_layers = ("conv_in", "conv_norm_out", "time_embedding")
    lora_targets = ()
    has_text_encoders = False
    guidance = "none"
    default_guidance_scale = 1.0
    default_sampler = Consistency()
    prediction_type = "sample"
    scale_factor = 1

    def _examine(self, image_size: ImageSize | None) -> None:
        file = self.path / "unet" / "config.json"
        unet = self._examined(UNet2DModel, "unet", PIXEL_UNET)
        size = as_image_size(sample_size(unet.config, file) if image_size is None else image_size)
        multiple = 2 ** (len(unet.config.block_out_channels) - 1)
        if any(side % multiple for side in size):
            raise ValueError(f"image_size must be a multiple of {multiple} for {self.source!r}, got {image_size!r}")
        self._set_shapes(
            size,
            channels=unet.config.in_channels,
            features=unet.conv_in.out_channels + unet.conv_norm_out.num_channels,
            time_embedding=unet.time_embedding.linear_2.out_features,
        )
        self.schedule, self._sigma_data, self._is_clipped = variance_exploding_consistency(self.path / "scheduler")
        self.boundary_time = self.schedule.clean
        self.num_classes: int | None = unet.config.num_class_embeds
        names = (_ANYTHING,) if self.num_classes is None else tuple(map(str, range(self.num_classes)))
        self.default_prompts = names

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        for prompt in prompts:
            if prompt not in self.default_prompts:
                raise ValueError(unknown_name("class", prompt, self.default_prompts))
        rows = [self.default_prompts.index(prompt) for prompt in prompts]
        return {"prompt_embeds": torch.tensor(rows, device=self.device, dtype=torch.float32)[:, None, None]}

    @override
    def to_x0_and_epsilon(self, model_output: Tensor, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        c_skip, c_out, _ = ve_scalings(t, sigma_data=self._sigma_data, sigma_min=self.schedule.clean)
        consistent = broadcast_to(c_skip, latents) * latents + broadcast_to(c_out, latents) * model_output
        if self._is_clipped:
            consistent = consistent.clamp(-1, 1)
        sigma = self.schedule.sigma(t)
        sigma = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)  # 0 at the boundary, where the noise is 0 too
        return consistent, (latents - consistent) / broadcast_to(sigma, latents)

    @override
    def _model_output(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        dtype = next(network.parameters()).dtype
        _, _, c_in = ve_scalings(t, sigma_data=self._sigma_data)
        labels = None if self.num_classes is None else conditioning["prompt_embeds"][:, 0, 0].long()
        inputs = (broadcast_to(c_in, latents) * latents).to(dtype)
        return network(inputs, 250 * (t + 1e-44).log(), class_labels=labels, return_dict=False)[0]

    def _decode(self, latents: Tensor) -> Tensor:
        return (latents / 2 + 0.5).clamp(0, 1)

    @override
    def encode(self, images: Tensor) -> Tensor:
        return images.float() * 2 - 1

    @override
    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        raise NotImplementedError("diffusers reads no LoRA layers of a UNet2DModel")

    @override
    def load_lora(self, denoiser: nn.Module, folder: Path) -> None:
        raise NotImplementedError("diffusers reads no LoRA layers of a UNet2DModel")
