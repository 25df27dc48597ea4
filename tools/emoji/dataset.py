"""The icons as training data: sampled, captioned, and put on backgrounds."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_gym.prompts.base import with_article

from .icons import ANIMALS, ANIMALS_AND_NATURE, FOOD, PEOPLE, Icon

IMAGE_SIZE = 64
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (24, 24, 28),
    "gray": (150, 152, 158),
    "red": (214, 69, 65),
    "orange": (240, 150, 60),
    "yellow": (248, 220, 100),
    "green": (96, 175, 98),
    "blue": (80, 140, 220),
    "purple": (145, 100, 190),
    "pink": (246, 172, 196),
    "brown": (140, 100, 72),
    "teal": (70, 170, 170),
}
COLOURS = tuple(BACKGROUNDS)
WHITE_SHARE = 0.25

# The share of the 45 animals, of the rest of nature and food, and of everything else with a name of at most two words.
SHARES = (0.5, 0.25, 0.25)
# Drawn worst so far.
HARD = {
    "fish": 2.0,
    "shark": 2.0,
    "whale": 2.0,
    "dolphin": 2.0,
    "snake": 2.0,
    "lizard": 2.0,
    "duck": 2.0,
    "turkey": 2.0,
    "kangaroo": 2.0,
}


@dataclass(frozen=True)
class Batch:
    """Pictures and what they are: images [B, 3, 64, 64] in [0, 1], and per row the name and the background's colour."""

    images: Tensor
    names: tuple[str, ...]
    colours: tuple[str, ...]


class IconData:
    """The rasterised icons.

    Args:
        folder: Where `tools.emoji.icons` wrote them.
        held_out: False: the styles to train on; True: the style to judge on.
    """

    def __init__(self, folder: Path, *, held_out: bool = False) -> None:
        icons = [Icon(**json.loads(line)) for line in (folder / "icons.jsonl").read_text().splitlines()]
        rows = [index for index, icon in enumerate(icons) if icon.held_out == held_out]
        self.icons = [icons[row] for row in rows]
        self.rgba = torch.from_numpy(np.load(folder / "rgba.npy")[rows])
        by_name: dict[str, list[int]] = {}
        for index, icon in enumerate(self.icons):
            for name in icon.captions:
                by_name.setdefault(name, []).append(index)
        self.by_name = by_name

    def __len__(self) -> int:
        return len(self.icons)

    def names(self, accept: Callable[[Icon], bool]) -> list[str]:
        """Return the names of the icons that are accepted, sorted."""
        return sorted({name for icon in self.icons if accept(icon) for name in icon.captions})

    def draw(self, names: Sequence[str], generator: torch.Generator) -> Tensor:
        """Return for each name the index of a random icon of that name."""
        uniform = torch.rand(len(names), generator=generator).tolist()
        return torch.tensor(
            [self.by_name[name][int(u * len(self.by_name[name]))] for name, u in zip(names, uniform, strict=True)]
        )

    def batch(self, names: Sequence[str], generator: torch.Generator) -> Batch:
        """Return a random, augmented picture of each name on a named background."""
        colours = draw_colours(len(names), generator)
        images = augment(self.rgba[self.draw(names, generator)], colours, generator)
        return Batch(images, tuple(names), colours)


class NameSampler:
    """Draws the names that a batch shows: the 45 animals half of the time, food and objects less often each."""

    def __init__(self, data: IconData) -> None:
        animals = [name for name in ANIMALS if name in data.by_name]
        taken = set(animals)
        nature = [name for name in data.names(_is_nature_or_food) if name not in taken]
        taken.update(nature)
        others = [name for name in data.names(_is_object) if name not in taken]
        self.names = [*animals, *nature, *others]
        shares = [
            torch.tensor([HARD.get(name, 1.0) for name in animals]),
            torch.ones(len(nature)),
            torch.ones(len(others)),
        ]
        self.weights = torch.cat([share * part / part.sum() for share, part in zip(SHARES, shares, strict=True)])

    def draw(self, count: int, generator: torch.Generator) -> list[str]:
        """Return random names, with repetition."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return [self.names[index] for index in chosen.tolist()]


def _is_nature_or_food(icon: Icon) -> bool:
    return icon.group in (ANIMALS_AND_NATURE, FOOD)


def _is_object(icon: Icon) -> bool:
    return icon.group != PEOPLE and len(icon.captions[0].split()) <= 2


def draw_colours(count: int, generator: torch.Generator) -> tuple[str, ...]:
    """Return random background colours, white a quarter of the time more often than the others."""
    white = torch.rand(count, generator=generator) < WHITE_SHARE
    index = torch.randint(0, len(COLOURS), (count,), generator=generator).masked_fill(white, COLOURS.index("white"))
    return tuple(COLOURS[k] for k in index.tolist())


def composite(
    rgba: Tensor, background: Tensor, *, flip: Tensor, scale: Tensor, shift: Tensor, rotation: Tensor
) -> Tensor:
    """Return icons on plain backgrounds, images [B, 3, 64, 64] in [0, 1].

    Args:
        rgba: [B, 60, 60, 4] premultiplied uint8.
        background: [B, 3] in [0, 1].
        flip: [B] bool, mirrored left to right.
        scale: [B] the icon's side over the picture's.
        shift: [B, 2] of the icon's centre, in half pictures.
        rotation: [B] in radians.
    """
    x = rgba.permute(0, 3, 1, 2).float() / 255
    cos, sin = rotation.cos() / scale, rotation.sin() / scale
    mirror = 1 - 2 * flip.float()
    linear = torch.stack([torch.stack([cos * mirror, -sin * mirror], -1), torch.stack([sin, cos], -1)], 1)
    affine = torch.cat([linear, -(linear @ shift[:, :, None])], -1)
    grid = F.affine_grid(affine, [len(x), 4, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    placed = F.grid_sample(x, grid, align_corners=False)
    return (placed[:, :3] + background[:, :, None, None] * (1 - placed[:, 3:])).clamp(0, 1)


def augment(rgba: Tensor, colours: Sequence[str], generator: torch.Generator) -> Tensor:
    """Return icons [B, 60, 60, 4] as images [B, 3, 64, 64]: scaled, shifted, turned a little, on colours.

    All colours but white are varied a little. Nothing is mirrored: a small model that has seen an animal face both ways
    draws what is between the two (dolphins became rings).
    """
    count = len(rgba)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    background = torch.tensor([BACKGROUNDS[colour] for colour in colours]) / 255
    varied = torch.tensor([colour != "white" for colour in colours])[:, None]
    background = (background + 0.03 * varied * torch.randn(count, 3, generator=generator)).clamp(0, 1)
    return composite(
        rgba,
        background,
        flip=torch.zeros(count, dtype=torch.bool),
        scale=uniform(0.84, 0.96),
        shift=uniform(-0.03, 0.03, 2),
        rotation=uniform(-0.05, 0.05),
    )


def draw_captions(
    names: Sequence[str], colours: Sequence[str], generator: torch.Generator, *, empty: float = 0.1
) -> list[str]:
    """Return captions: "a cat" (half), "cat", "an emoji of a cat", "a cat on a blue background", or nothing at all.

    Args:
        names: What is shown.
        colours: The backgrounds' names.
        generator: The randomness.
        empty: The share of empty captions, from which classifier-free guidance learns its unconditional half.
    """

    def caption(name: str, colour: str, u: float) -> str:
        if u < empty:
            return ""
        u = (u - empty) / (1 - empty)
        if u < 0.56:
            return with_article(name)
        if u < 0.67:
            return name
        if u < 0.72:
            return f"an emoji of {with_article(name)}"
        return f"{with_article(name)} on {with_article(colour)} background"

    uniform = torch.rand(len(names), generator=generator).tolist()
    return [caption(*row) for row in zip(names, colours, uniform, strict=True)]
