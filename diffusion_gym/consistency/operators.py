"""Linear operators on images: what of an image is known, and what is free.

Each is described once, by the orthonormal A and the Ω of algorithm 4 of "Consistency Models", and by the image that
shows what is known and nothing else.

Source: Song et al., 2023, "Consistency Models", appendix D, https://arxiv.org/abs/2303.01469.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import checked_integer
from ..parts import GIVEN_AGAIN, Part

_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601: a gray pixel is its own luma


def orthonormal_basis(first: Tensor) -> Tensor:
    """Return an orthonormal, symmetric matrix [D, D] whose first row is this vector [D] at unit length.

    It is Householder's reflection of (1, 0, …, 0) to the vector, I − 2vvᵀ/vᵀv.
    """
    unit = first / first.norm()
    v = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)[0] - unit
    return torch.eye(len(unit), dtype=unit.dtype, device=unit.device) - 2 * torch.outer(v, v) / v.dot(v).clamp(
        min=1e-30
    )


class Operator(Part, ABC):
    """What is known of an image: some of the coordinates of A·x, for an orthonormal A.

    A cuts the image into vectors of D numbers (the channels of a pixel, the pixels of a block …) and turns each by the
    same matrix. Which of the coordinates are free is Ω.
    """

    @abstractmethod
    def vectors(self, images: Tensor) -> Tensor:
        """Return the vectors that images [B, C, H, W] are cut into, [B, N, D].

        Raises:
            ValueError: such images cannot be cut so.
        """

    @abstractmethod
    def images(self, vectors: Tensor, like: Tensor) -> Tensor:
        """Return the images, shaped like `like` [B, C, H, W], that were cut into vectors [B, N, D]."""

    @abstractmethod
    def basis(self, like: Tensor) -> Tensor:
        """Return the matrix that turns a vector, [D, D] with orthonormal rows, in the precision of `like`."""

    @abstractmethod
    def is_free(self, like: Tensor) -> Tensor:
        """Return which coordinates of images like `like` are free, bool, to broadcast to [B, N, D]."""

    @abstractmethod
    def start(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] that have what is known of these, [B, 3, H, W] in [0, 1], and show nothing else."""

    def on_latents(self, latent_shape: tuple[int, int, int]) -> "Operator":
        """Return the same operator on latents [B, *latent_shape].

        Raises:
            ValueError: there is none, as an autoencoder is not linear.
        """
        raise ValueError(
            f'{type(self).__name__} acts on pixels alone, for an autoencoder is not linear: space="pixels"'
        )

    @final
    def transform(self, images: Tensor) -> Tensor:
        """Return the coordinates A·x of images [B, C, H, W], [B, N, D]."""
        return self.vectors(images) @ self.basis(images).T

    @final
    def inverse(self, coordinates: Tensor, like: Tensor) -> Tensor:
        """Return the images A⁻¹·c of coordinates [B, N, D], shaped like `like`."""
        return self.images(coordinates @ self.basis(like), like)

    @final
    def project(self, images: Tensor, known: Tensor) -> Tensor:
        """Return A⁻¹[(A·y)(1 − Ω) + (A·x)Ω]: the images x nearest to these that have what is known of y.

        Args:
            images: [B, C, H, W] x.
            known: [B, C, H, W] y, whose free coordinates have no effect.
        """
        coordinates = torch.where(self.is_free(images), self.transform(images), self.transform(known))
        return self.inverse(coordinates, images)

    @final
    def restore(self, images: Tensor, known: Tensor) -> Tensor:
        """Return the projection, in [0, 1]: what is known is kept to the last bits of float32, whatever had to give.

        Each vector of the projection that leaves [0, 1] is drawn towards that of `start`, no further than it has to be:
        a colour loses saturation, a block contrast. (Cut off at 0 and 1, it would lose its luma or its mean.)
        """
        base = self.vectors(self.start(known))
        moved = self.vectors(self.project(images, known)) - base
        room = torch.where(moved > 0, (1 - base) / moved, torch.where(moved < 0, -base / moved, 1.0))
        reach = room.amin(-1, keepdim=True).clamp(0, 1)
        return self.images(base + reach * moved, images).clamp(0, 1)  # of rounding errors


@final
@dataclass(frozen=True, eq=False)
class Inpainting(Operator):
    """Some pixels are known, and the model draws the rest. A is the identity.

    Args:
        mask: Bool, True where the image is free, to broadcast to [B, 3, H, W]: [H, W] is one mask for all images.

    Raises:
        TypeError: `mask` is no bool tensor.
    """

    mask: Tensor = field(metadata=GIVEN_AGAIN)

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool or self.mask.ndim < 2:
            raise TypeError(
                f"mask must be a bool tensor [H, W] or [B, 3, H, W], True where free; got {self.mask!r:.200}"
            )

    def vectors(self, images: Tensor) -> Tensor:
        """Every value is a vector of its own, [B, C·H·W, 1]."""
        return images.flatten(1)[..., None]

    def images(self, vectors: Tensor, like: Tensor) -> Tensor:
        """The values in their places."""
        return vectors.reshape(like.shape)

    def basis(self, like: Tensor) -> Tensor:
        """The identity, [1, 1]."""
        return like.new_ones(1, 1)

    def is_free(self, like: Tensor) -> Tensor:
        """The mask, [B, C·H·W, 1]."""
        return self._mask(like).flatten(1)[..., None]

    def start(self, images: Tensor) -> Tensor:
        """The known pixels, and around them the mean of each channel over them; gray where nothing is known."""
        free = self._mask(images)
        count = (~free).sum((2, 3), keepdim=True)
        mean = images.masked_fill(free, 0.0).sum((2, 3), keepdim=True) / count.clamp(min=1)
        return torch.where(free, torch.where(count > 0, mean, 0.5), images)

    def on_latents(self, latent_shape: tuple[int, int, int]) -> "Inpainting":
        """A latent is free where any pixel of it is."""
        mask = self.mask.reshape(-1, *self.mask.shape[-3:]) if self.mask.ndim > 2 else self.mask[None, None]
        mask = mask.any(-3, keepdim=True).float()
        return Inpainting(F.adaptive_max_pool2d(mask, latent_shape[1:]) > 0)

    def _mask(self, like: Tensor) -> Tensor:
        try:
            return self.mask.to(like.device).expand(like.shape)
        except RuntimeError as error:
            raise ValueError(
                f"the mask of shape {list(self.mask.shape)} does not broadcast to images {list(like.shape)}"
            ) from error


@final
@dataclass(frozen=True)
class Colourisation(Operator):
    """The luma of every pixel is known, .299·R + .587·G + .114·B, and the model chooses the colours.

    A turns the three channels of a pixel so that the first coordinate is the luma, at the length of its weights.
    """

    def vectors(self, images: Tensor) -> Tensor:
        """The channels of each pixel, [B, H·W, 3]."""
        if images.shape[1] != len(_LUMA):
            raise ValueError(f"colours need images of 3 channels, got {list(images.shape)}")
        return images.flatten(2).transpose(1, 2)

    def images(self, vectors: Tensor, like: Tensor) -> Tensor:
        """The pixels in their places."""
        return vectors.transpose(1, 2).reshape(like.shape)

    def basis(self, like: Tensor) -> Tensor:
        """The luma's weights, and two directions that change no luma, [3, 3]."""
        return orthonormal_basis(like.new_tensor(_LUMA))

    def is_free(self, like: Tensor) -> Tensor:
        """All but the first coordinate of each pixel."""
        return torch.tensor([False, True, True], device=like.device)

    def start(self, images: Tensor) -> Tensor:
        """The gray image."""
        return (
            (self.vectors(images) @ images.new_tensor(_LUMA))[:, None]
            .reshape(-1, 1, *images.shape[2:])
            .expand_as(images)
        )


@final
@dataclass(frozen=True)
class SuperResolution(Operator):
    """The means of blocks of pixels are known, a picture of low resolution, and the model draws the details.

    A small picture is given at full size, as `torch.nn.functional.interpolate(small, scale_factor=factor)`. A turns the
    pixels of a block, channel by channel, so that the first coordinate is `factor` times their mean.

    Args:
        factor: The height and width of a block in pixels, at least 2; a divisor of the image's.

    Raises:
        ValueError: it is none of that.
    """

    factor: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", checked_integer("factor", self.factor, at_least=2))

    def vectors(self, images: Tensor) -> Tensor:
        """The pixels of each block of each channel, [B, C·H·W/factor², factor²]."""
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(f"factor={self.factor} does not divide images of {list(images.shape[2:])} pixels")
        batch, channels = images.shape[:2]
        blocks = F.pixel_unshuffle(images, self.factor).reshape(batch, channels, self.factor**2, -1)
        return blocks.transpose(2, 3).reshape(batch, -1, self.factor**2)

    def images(self, vectors: Tensor, like: Tensor) -> Tensor:
        """The blocks in their places."""
        batch, channels, height, width = like.shape
        blocks = vectors.reshape(batch, channels, -1, self.factor**2).transpose(2, 3)
        return F.pixel_shuffle(blocks.reshape(batch, -1, height // self.factor, width // self.factor), self.factor)

    def basis(self, like: Tensor) -> Tensor:
        """The mean's direction, and others in which it does not change, [factor², factor²]."""
        return orthonormal_basis(like.new_ones(self.factor**2))

    def is_free(self, like: Tensor) -> Tensor:
        """All but the first coordinate of each block."""
        return torch.arange(self.factor**2, device=like.device) > 0

    def start(self, images: Tensor) -> Tensor:
        """The blocks, each of one colour."""
        blocks = self.vectors(images)
        return self.images(blocks.mean(-1, keepdim=True).expand_as(blocks), images)
