"""The size of the image as a JPEG file, and its negative: DDPO's two tasks that need no model."""

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from ..checks import checked_integer
from .base import Metadata, Reward, RewardOutput, to_uint8


def as_files(pictures: np.ndarray, image_format: str, options: Mapping[str, int]) -> list[bytes]:
    """Return pictures [B, H, W, 3] uint8 as files, "png" or "jpeg", with Pillow's options.

    Its encoders release the interpreter's lock, so that a batch is encoded in threads.
    """

    def as_file(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=image_format, **options)
        return buffer.getvalue()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(as_file, pictures))


def jpeg_kilobytes(images: Tensor, *, quality: int = 95) -> Tensor:
    """Return the size of each image as a JPEG file in kB (1 kB = 1000 bytes): [B] float32, on the images' device.

    The encoder is Pillow's, with its default subsampling and without optimisation.

    Source: Black et al., 2023 (DDPO), section 5.1, https://arxiv.org/abs/2305.13301; the quality is ddpo-pytorch's.

    Args:
        images: [B, 3, H, W], RGB in [0, 1].
        quality: libjpeg's quality, 1 to 95.

    Raises:
        ValueError: one of the images is NaN or infinite.
    """
    files = as_files(to_uint8(images).numpy(), "jpeg", {"quality": checked_integer("quality", quality, at_least=1)})
    sizes = [len(file) / 1000 for file in files]
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


class Incompressibility(Reward):
    """+kB of the JPEG at quality 95: richer, busier images score higher."""

    name = "incompressibility"
    unit = "kB"
    range = (0.0, float("inf"))

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        return RewardOutput(jpeg_kilobytes(images))


class Compressibility(Reward):
    """−kB of the JPEG at quality 95: plainer images score higher."""

    name = "compressibility"
    unit = "kB"
    range = (-float("inf"), 0.0)

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        return RewardOutput(-jpeg_kilobytes(images))
