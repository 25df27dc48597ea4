"""Rewards that are plain functions of the pixels, computed on the images' device."""

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from .base import Metadata, Reward, RewardOutput


class Brightness(Reward):
    """The mean of all pixels and channels, in [0, 1]: for tests and first experiments."""

    name = "brightness"
    range = (0.0, 1.0)

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        return RewardOutput(images.float().mean(dim=(1, 2, 3)))
