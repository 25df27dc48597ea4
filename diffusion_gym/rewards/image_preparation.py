"""The preparation of images for CLIP and BLIP: bicubic resizing, cropping, normalisation, on any device."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import cached_file

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_levels(images: Tensor) -> Tensor:
    """Return images in [0, 1] as the levels 0, 1, …, 255 of a saved image, in float32."""
    return (images.float() * 255).round().clamp(0, 255)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Return images [B, 3, height, width] by bicubic interpolation (a = −½) with antialiasing, not clamped."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode="bicubic", align_corners=False, antialias=True)


def resize_levels(levels: Tensor, height: int, width: int) -> Tensor:
    """Return levels 0 to 255 resized as by Pillow's bicubic: rows, then columns, each rounded half up."""
    for size in ((levels.shape[-2], width), (height, width)):
        levels = (resize(levels, *size) + 0.5).floor().clamp(0, 255)
    return levels


@dataclass(frozen=True)
class ImagePreparation:
    """CLIP's preparation of images: the shorter side to `size`, the centre, (x − mean)/std per channel.

    Images are rounded to bytes before and after the resize, as those were that the published models saw.

    Note:
        Equal to transformers' CLIPImageProcessor on Pillow but for a level or two (1/255) in rare pixels, where sums in
        float32 round another way: of noise, 0.05 % of the values from 512² to 224², 0.6 % from 64². The centre is cut
        at ⌊(h − c)/2⌋, as there; torchvision rounds to the nearest, which can be the next row or column.

    Args:
        size: The shorter side after the resize, pixels.
        crop: Height and width of the centre that is kept, pixels; at most `size`.
        mean: The mean of each channel, of images in [0, 1].
        std: The standard deviation of each channel.
    """

    size: int = 224
    crop: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __post_init__(self) -> None:
        if max(self.crop) > self.size:
            raise ValueError(f"the centre crop {self.crop} must not be larger than the shorter side, {self.size}")

    @classmethod
    def load(cls, source: str, *, local_files_only: bool = False) -> "ImagePreparation":
        """Return the preparation that `preprocessor_config.json` of a folder or a Hub id describes."""
        file = cached_file(source, "preprocessor_config.json", local_files_only=local_files_only)
        config = json.loads(Path(file).read_text())
        size, crop = config["size"], config["crop_size"]
        return cls(
            size if isinstance(size, int) else size["shortest_edge"],
            (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"]),
            tuple(config["image_mean"]),
            tuple(config["image_std"]),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Return [B, 3, *crop] float32, normalised.

        Args:
            images: [B, 3, H, W], RGB in [0, 1].
        """
        height, width = images.shape[-2:]
        short = min(height, width)
        levels = resize_levels(to_levels(images), self.size * height // short, self.size * width // short)
        top = (levels.shape[-2] - self.crop[0]) // 2
        left = (levels.shape[-1] - self.crop[1]) // 2
        return self.normalise(levels[..., top : top + self.crop[0], left : left + self.crop[1]] / 255)

    def normalise(self, images: Tensor) -> Tensor:
        """Return (x − mean)/std."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=images.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (images - mean) / std
