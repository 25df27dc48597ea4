"""Augmentation strong enough to recognise a drawing in a style that was never seen."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import BACKGROUNDS, COLOURS, composite


class Randomness:
    """Per-sample random numbers from one generator."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count = count
        self.generator = generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return numbers [B, *shape] between `low` and `high`."""
        return torch.rand(self.count, *shape, generator=self.generator) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers [B, *shape]."""
        return torch.randn(self.count, *shape, generator=self.generator)

    def chosen(self, probability: float) -> Tensor:
        """Return a mask [B, 1, 1, 1], true with a probability."""
        return torch.rand(self.count, 1, 1, 1, generator=self.generator) < probability


def outline(rgba: Tensor, width: int, tint: Tensor, wash: Tensor) -> Tensor:
    """Return premultiplied icons [B, 4, h, w] in [0, 1] with dark lines around and inside the drawing.

    Args:
        rgba: The icons.
        width: The lines' width in pixels, outside the drawing.
        tint: [B, 3, 1, 1] the colour that the areas between the lines fade to.
        wash: [B, 1, 1, 1] how far they fade.
    """
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    around = F.max_pool2d(alpha, 2 * width + 1, 1, width)
    blurred = F.avg_pool2d(colour, 3, 1, 1)
    contrast = (F.max_pool2d(blurred, 3, 1, 1) + F.max_pool2d(-blurred, 3, 1, 1)).amax(1, keepdim=True)
    edges = F.max_pool2d(((contrast - 0.25) * 6).clamp(0, 1), width // 2 * 2 + 1, 1, width // 2) * alpha
    ink = torch.maximum(edges, (around - alpha).clamp(0, 1))
    faded = colour + wash * (tint * alpha - colour)
    return torch.cat([faded * (1 - ink), torch.maximum(alpha, ink)], 1)


def jitter_colours(images: Tensor, random: Randomness) -> Tensor:
    """Return images with other brightness, contrast, saturation and hue; a tenth of them gray."""
    gray = images.mean(1, keepdim=True)
    saturation = random.uniform(0.3, 1.5, 1, 1, 1).masked_fill(random.chosen(0.1), 0.0)
    images = gray + saturation * (images - gray)
    mix = torch.eye(3) + 0.12 * random.normal(3, 3)
    images = torch.einsum("bij,bjhw->bihw", mix / mix.sum(-1, keepdim=True), images)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + random.uniform(0.6, 1.3, 1, 1, 1) * (images - mean) + random.uniform(-0.12, 0.12, 1, 1, 1)


def soften(images: Tensor, random: Randomness) -> Tensor:
    """Return images of which a third are blurred as a small autoencoder blurs, and all carry a little noise."""
    blurred = random.chosen(0.35).flatten()
    sharp = images[blurred]
    small = F.interpolate(F.avg_pool2d(sharp, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    images = images + 0.05 * random.normal(1, 1, 1).abs() * random.normal(*images.shape[1:])
    images[blurred] += random.uniform(0.3, 1, 1, 1, 1)[blurred] * (small - sharp)
    return images


def hide(images: Tensor, random: Randomness) -> Tensor:
    """Return images of which a quarter have a gray rectangle of up to a third of a side somewhere."""
    side = images.shape[-1]
    y, x = random.uniform(0, 1, 1, 1, 1), random.uniform(0, 1, 1, 1, 1)
    height, width = random.uniform(0.1, 0.33, 1, 1, 1), random.uniform(0.1, 0.33, 1, 1, 1)
    axis = torch.arange(side) / side
    inside = ((axis[:, None] - y).abs() < height / 2) & ((axis[None, :] - x).abs() < width / 2)
    return torch.where(inside & random.chosen(0.25), random.uniform(0, 1, 1, 1, 1), images)


def distort(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Return icons [B, 60, 60, 4] as strongly augmented images [B, 3, 64, 64] in [0, 1].

    Two fifths are outlined, some of these with washed-out areas; all are turned (±20°), scaled (.6 to 1), shifted,
    mirrored, put on plain colours, recoloured, softened and partly hidden.
    """
    random = Randomness(len(rgba), generator)
    drawn = rgba.permute(0, 3, 1, 2).float() / 255
    for width in (1, 2):
        outlined = random.chosen(0.2).flatten()
        tint = torch.where(random.chosen(0.5), torch.ones(()), random.uniform(0.2, 1, 3, 1, 1))
        wash = random.uniform(0.3, 1, 1, 1, 1) * random.chosen(0.4)
        drawn[outlined] = outline(drawn[outlined], width, tint[outlined], wash[outlined])
    index = torch.randint(0, len(COLOURS), (len(rgba),), generator=generator)
    named = torch.tensor([BACKGROUNDS[COLOURS[k]] for k in index.tolist()]) / 255
    background = torch.where(random.uniform(0, 1, 1) < 0.3, random.uniform(0, 1, 3), named)
    background = torch.where(random.uniform(0, 1, 1) < 0.2, torch.ones(()), background)
    images = composite(
        (drawn * 255).permute(0, 2, 3, 1),
        background,
        flip=random.uniform(0, 1) < 0.5,
        scale=random.uniform(0.6, 1.0),
        shift=random.uniform(-0.12, 0.12, 2),
        rotation=random.uniform(-0.35, 0.35),
    )
    return hide(soften(jitter_colours(images, random), random), random).clamp(0, 1)
