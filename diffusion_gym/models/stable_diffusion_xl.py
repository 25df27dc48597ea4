"""Stable Diffusion XL, and every model in its layout: two CLIP text encoders, and a UNet that is told sizes too."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection
from typing_extensions import override

from .base import Conditioning, ImageSize, outside_inference_mode
from .schedulers import discrete_schedule
from .stable_diffusion import UNetModel
from .text_encoders import TextEncoder, stacked
from .understood import XL_SCHEDULER, XL_UNET, XL_VAE

_NUM_TIME_IDS = 6


class StableDiffusionXLModel(UNetModel):
    """A `StableDiffusionXLPipeline` folder: Stable Diffusion XL 1.0 and its fine-tunes.

    A prompt is read by two text encoders. The UNet attends to their last hidden layers but one, side by side, and is
    told the second one's pooled embedding and six numbers: the size of the original image, the corner at which it was
    cropped, and the size of the result. They are, as by the pipeline's default, (image_size, (0, 0), image_size).

    The negative prompt "" is the pipeline's `negative_prompt=None`: where the folder says
    `force_zeros_for_empty_prompt`, as that of XL 1.0, its embeddings are zeros. As a prompt, "" is encoded.

    Note:
        The pipeline draws a watermark into its images where the package invisible-watermark is installed; this does
        not. The refiner, which goes on from another model's latents, is refused.

    Source: Podell et al., 2023, "SDXL", sections 2.1 to 2.2, https://arxiv.org/abs/2307.01952.
    """

    components: ClassVar = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    default_guidance_scale = 5.0

    def _examine(self, image_size: ImageSize | None) -> None:
        index = self.path / "model_index.json"
        self._zeros_for_empty = self._index.get("force_zeros_for_empty_prompt", True)
        if not isinstance(self._zeros_for_empty, bool):
            raise ValueError(
                f"{index}: force_zeros_for_empty_prompt must be true or false, got {self._zeros_for_empty!r}: restore "
                "the file that came with the model"
            )
        unet = self._examine_unet(XL_UNET, image_size, vae=XL_VAE)
        self._text = TextEncoder(self.path, variant=self.variant)
        self._text_2 = TextEncoder(
            self.path, "text_encoder_2", variant=self.variant, network=CLIPTextModelWithProjection
        )
        self._check_texts(unet)
        self.schedule, self.prediction_type = discrete_schedule(
            self.path / "scheduler", class_name=self._scheduler_class(), understood=XL_SCHEDULER
        )

    def _check_texts(self, unet: Any) -> None:
        """Raise ValueError unless the text encoders fit each other and the UNet."""
        self._check_text_width(unet, self._text, self._text_2)
        if self._text.limit != self._text_2.limit:
            raise ValueError(
                f"{self.path}: text_encoder reads {self._text.limit} tokens of a prompt, text_encoder_2 "
                f"{self._text_2.limit}: they do not belong together"
            )
        told = _NUM_TIME_IDS * unet.config.addition_time_embed_dim + self._text_2.config.projection_dim
        expected = unet.config.projection_class_embeddings_input_dim
        if told != expected:
            raise ValueError(
                f"{self.path / 'unet' / 'config.json'}: projection_class_embeddings_input_dim is {expected}, but "
                f"{_NUM_TIME_IDS} times addition_time_embed_dim and text_encoder_2's projection_dim are {told}: they "
                "do not belong together"
            )

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        outputs = self._text.outputs(self._text_encoder, prompts)
        hidden = stacked(output["hidden_states"][-2] for output in outputs)
        hidden_2, pooled = self._text_2.hidden_and_pooled(self._text_encoder_2, prompts)
        return {"prompt_embeds": torch.cat([hidden, hidden_2], dim=2), "pooled_prompt_embeds": pooled}

    @override
    def _as_negative(self, prompt: str, row: Tensor) -> Tensor:
        return torch.zeros_like(row) if self._zeros_for_empty and not prompt else row

    @cached_property
    def _time_ids(self) -> Tensor:
        """The original size, the corner of the crop and the size of the result, [1, 6]."""
        with outside_inference_mode():
            return torch.tensor([[*self.image_size, 0, 0, *self.image_size]], dtype=torch.float32, device=self.device)

    def _model_output(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        dtype = next(network.parameters()).dtype
        told = {
            "text_embeds": conditioning["pooled_prompt_embeds"].to(dtype),
            "time_ids": self._time_ids.expand(len(latents), -1),
        }
        embeds = conditioning["prompt_embeds"].to(dtype)
        return network(latents.to(dtype), t, encoder_hidden_states=embeds, added_cond_kwargs=told, return_dict=False)[0]
