import numpy as np
import pytest
import torch

from agents.logs.images import captioned_grid

RED = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None]


def is_red(grid):
    return (grid == (255, 0, 0)).all(2)


def below_each(grid, count):
    """Return what is under each image of a grid of red squares."""
    image = is_red(grid)
    tops = np.flatnonzero(np.diff(image.any(1).astype(int), prepend=0, append=0)).reshape(-1, 2)
    lefts = np.flatnonzero(np.diff(image.any(0).astype(int), prepend=0, append=0)).reshape(-1, 2)
    ends = [*(top for top, _ in tops[1:]), len(grid)]
    cells = [grid[bottom:end, left:right] for (_, bottom), end in zip(tops, ends, strict=True) for left, right in lefts]
    return cells[:count]


@pytest.mark.parametrize(("side", "shown"), [(64, 128), (1, 128), (200, 200), (512, 256)])
def test_small_images_are_enlarged_and_large_ones_made_smaller(side, shown):
    grid = captioned_grid(RED.expand(2, 3, side, side), [("a cat", "1 kB")] * 2)
    assert grid.dtype == np.uint8
    assert is_red(grid).sum() == 2 * shown**2
    assert is_red(grid).any(0).sum() == 2 * shown


@pytest.mark.parametrize("side", [64, 256])
def test_captions_change_the_pixels_under_their_image_and_no_others(side):
    images = RED.expand(6, 3, side, side)
    captions = [("a cat", "1.50 kB")] * 6
    changed = [*captions[:4], ("a cat", "9.99 kB"), ("a dog", "1.50 kB")]
    before, after = captioned_grid(images, captions), captioned_grid(images, changed)
    pairs = list(zip(below_each(before, 6), below_each(after, 6), strict=True))
    assert len(pairs) == 6
    assert all((one < 128).any() for one, _ in pairs)
    assert [bool((one != other).any()) for one, other in pairs] == [False] * 4 + [True] * 2


def test_a_long_prompt_stays_under_its_image():
    grid = captioned_grid(RED.expand(2, 3, 64, 64), [("supercalifragilistic " * 3 + "and " * 50, "1 kB"), ("", "")])
    long, empty = below_each(grid, 2)
    assert (long < 128).any()
    assert (empty == 255).all()
    assert (grid[:, -16:] == 255).all()


def test_the_images_are_in_reading_order():
    images = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 3, 64, 64)
    grid = captioned_grid(images, [("", "")] * 6)
    starts = [grid[row, column, 0] for row in (30, grid.shape[0] // 2 + 30) for column in (60, 210, 355, 500)]
    assert starts == [0, 51, 102, 153, 204, 255, 255, 255]


def test_a_grid_needs_images_and_captions_for_each():
    with pytest.raises(ValueError, match="got 0 images"):
        captioned_grid(torch.zeros(0, 3, 8, 8), [])
    with pytest.raises(ValueError, match="got 2 images and 1 pairs"):
        captioned_grid(torch.zeros(2, 3, 8, 8), [("", "")])
