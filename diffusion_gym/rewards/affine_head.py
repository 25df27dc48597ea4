"""The head that LAION's aesthetic predictor and ImageReward share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class AffineHead(nn.Module):
    """Linear layers width → 1024 → 128 → 64 → 16 → 1 without activations: an affine function, in five factors.

    The layers are numbered as in the published checkpoints (`layers.0`, `2`, `4`, `6` and `7`: the numbers between are
    dropouts). Parameters stay float32 when the network around them is moved to another dtype, for the product of five
    matrices would lose what the features have.

    Source: Schuhmann, 2022, https://github.com/christophschuhmann/improved-aesthetic-predictor

    Args:
        width: The features' length.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024, dtype=torch.float32),
            nn.Dropout(0.2),
            nn.Linear(1024, 128, dtype=torch.float32),
            nn.Dropout(0.2),
            nn.Linear(128, 64, dtype=torch.float32),
            nn.Dropout(0.1),
            nn.Linear(64, 16, dtype=torch.float32),
            nn.Linear(16, 1, dtype=torch.float32),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AffineHead":
        """Follow the network to its device, and keep the dtype."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def forward(self, features: Tensor) -> Tensor:
        """Return one number per row of features [B, width]: [B] float32."""
        return self.layers(features.to(torch.float32)).squeeze(-1)
