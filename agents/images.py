"""Grids of images for logs and pictures."""

import torch
from torch import Tensor


def image_grid(images: Tensor, *, columns: int, padding: int = 2) -> Tensor:
    """Return images [B, 3, H, W] as one, [3, rows·(H + p) + p, columns·(W + p) + p], in reading order on white."""
    if not len(images):
        raise ValueError("an image grid needs at least one image, got none")
    _, channels, height, width = images.shape
    rows = -(-len(images) // columns)
    shape = (channels, rows * (height + padding) + padding, columns * (width + padding) + padding)
    grid = torch.ones(shape, dtype=images.dtype, device=images.device)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = padding + row * (height + padding), padding + column * (width + padding)
        grid[:, top : top + height, left : left + width] = image
    return grid
