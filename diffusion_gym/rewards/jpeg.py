"""The size of the image as a JPEG file, and its negative: DDPO's two tasks that need no model."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .base import Metadata, Reward, RewardOutput, to_uint8


def jpeg_kilobytes(images: Tensor, *, quality: int = 95) -> Tensor:
    """Return the size of each image as a JPEG file in kB (1 kB = 1000 bytes): [B] float32, on the images' device.

    Pillow's encoder with its default subsampling and without optimisation; it releases the interpreter's lock, so
    that a batch is encoded in threads.

    Source: Black et al., 2023 (DDPO), section 5.1, https://arxiv.org/abs/2305.13301; the quality is ddpo-pytorch's.

    Args:
        images: [B, 3, H, W], RGB in [0, 1].
        quality: libjpeg's quality, 1 to 95.

    Raises:
        ValueError: one of the images is NaN or infinite.
    """

    def size(pixels: np.ndarray) -> float:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
        return buffer.tell() / 1000

    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(size, to_uint8(images).numpy()))
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


class Incompressibility(Reward):
    """+kB of the JPEG at quality 95: richer, busier images score higher."""

    name = "incompressibility"
    unit = "kB"
    range = (0.0, float("inf"))

    def __call__(  # noqa: D102
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        return RewardOutput(jpeg_kilobytes(images))


class Compressibility(Reward):
    """−kB of the JPEG at quality 95: plainer images score higher."""

    name = "compressibility"
    unit = "kB"
    range = (-float("inf"), 0.0)

    def __call__(  # noqa: D102
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        return RewardOutput(-jpeg_kilobytes(images))
