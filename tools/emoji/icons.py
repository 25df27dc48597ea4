"""Rasterise the icon sets and caption them.

    python -m tools.emoji.icons

writes `build/emoji/icons/`: `rgba.npy`, [N, 60, 60, 4] premultiplied, cropped to the drawing; `icons.jsonl`, what each
row is; `animals.png`, the 45 animals of the DDPO paper in every style (a minute on one core).
"""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import resvg_py
import tyro
from PIL import Image

from diffusion_gym.prompts import make_prompts

from .sources import ICONS, NAMES, REGISTRY, WORK, IconSource, fetch

ICON_SIZE = 60
RASTER_SIZE = 96
ANIMALS = tuple(prompt.split(" ", 1)[1] for prompt in make_prompts("simple_animals"))

# Unicode's groups, by emojibase's numbers.
FACES, PEOPLE, ANIMALS_AND_NATURE, FOOD, TRAVEL, ACTIVITIES, OBJECTS = 0, 1, 3, 4, 5, 6, 7
MAX_WORDS = dict.fromkeys((FACES, PEOPLE, ANIMALS_AND_NATURE, FOOD, TRAVEL, ACTIVITIES, OBJECTS), 3) | {PEOPLE: 2}
EXTRA_CAPTIONS = {
    "honeybee": "bee",
    "chipmunk": "squirrel",
    "rooster": "chicken",
    "spouting whale": "whale",
    "tropical fish": "fish",
    "baby chick": "chick",
    "ewe": "sheep",
    "ram": "sheep",
    "two-hump camel": "camel",
    "poodle": "dog",
    "lady beetle": "ladybug",
    "water buffalo": "buffalo",
    "hatching chick": "chick",
    "front-facing baby chick": "chick",
}
# Streamline's "turkey" is the flag.
NOT_WHAT_THEY_ARE_CALLED = {("streamline", "turkey")}


@dataclass(frozen=True)
class Concept:
    """One emoji, whatever style it is drawn in.

    Args:
        code: Its Unicode code points as Iconify writes them: "1f431".
        captions: What it is called, the full name first: ("cat face", "cat").
        group: Unicode's group.
    """

    code: str
    captions: tuple[str, ...]
    group: int


@dataclass(frozen=True)
class Icon:
    """What one row of `rgba.npy` is."""

    style: str
    captions: tuple[str, ...]
    group: int
    held_out: bool


def read_concepts(names: Path) -> list[Concept]:
    """Return the emoji that have a short name: no flags, symbols, skin tones, hair styles."""
    concepts = []
    for entry in json.loads((names / "en" / "data.json").read_text()):
        group, label = entry.get("group"), entry["label"].lower()
        if group not in MAX_WORDS or ":" in label or "skin tone" in label:
            continue
        label = re.sub(r"[“”\"()!]", "", label).replace("’", "'").strip()
        if len(label.split()) > MAX_WORDS[group]:
            continue
        captions = [label]
        if group == ANIMALS_AND_NATURE and label.endswith(" face"):
            captions.append(label.removesuffix(" face"))
        if label in EXTRA_CAPTIONS:
            captions.append(EXTRA_CAPTIONS[label])
        concepts.append(Concept(entry["hexcode"].lower().replace("-fe0f", ""), tuple(captions), group))
    return concepts


def _plain(name: str) -> str:
    """Return a name without what the sets write differently: "fox-face-1" and "Foxface" are both "foxface"."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"-\d$", "", name.lower()))


def read_svgs(folder: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return an Iconify set's drawings by name, and the names that stand for each code point or plain name."""
    collection = json.loads((folder / "icons.json").read_text())
    svgs = {}
    for name, icon in collection["icons"].items():
        width = icon.get("width", collection.get("width", 16))
        height = icon.get("height", collection.get("height", 16))
        svgs[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
            f'width="{RASTER_SIZE}" height="{RASTER_SIZE}">{icon["body"]}</svg>'
        )
    characters = folder / "chars.json"
    codes = json.loads(characters.read_text()) if characters.is_file() else {}
    aliases = {name: alias["parent"] for name, alias in collection.get("aliases", {}).items()}
    found: dict[str, list[str]] = {}
    if codes:
        for code, name in codes.items():
            found.setdefault(code.lower().replace("-fe0f", ""), []).append(aliases.get(name, name))
    else:
        for name in [*svgs, *aliases]:
            found.setdefault(_plain(name), []).append(aliases.get(name, name))
    return svgs, found


def drawings(source: IconSource, folder: Path, concepts: Sequence[Concept]) -> Iterator[tuple[Concept, str | Path]]:
    """Yield each concept that a set has with its drawing: an SVG, or the path of a picture."""
    if (folder / "assets").is_dir():
        pictures = {path.stem.replace("-fe0f", ""): path for path in sorted((folder / "assets").iterdir())}
        yield from ((concept, pictures[concept.code]) for concept in concepts if concept.code in pictures)
        return
    svgs, found = read_svgs(folder)
    for concept in concepts:
        keys = [concept.code, *(_plain(caption) for caption in concept.captions)]
        if concept.group == FACES:
            keys.append(_plain(concept.captions[0]) + "face")
        names = next((found[key] for key in keys if key in found), [])
        for name in dict.fromkeys(names):
            if name in svgs and (source.style, name) not in NOT_WHAT_THEY_ARE_CALLED:
                yield concept, svgs[name]


def rasterise(drawing: str | Path) -> np.ndarray | None:
    """Return a drawing as premultiplied RGBA [60, 60, 4], cropped to a centred square; None: it is hardly there."""
    if isinstance(drawing, Path):
        image = Image.open(drawing).convert("RGBA")
    else:
        png = resvg_py.svg_to_bytes(svg_string=drawing, width=RASTER_SIZE, height=RASTER_SIZE)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    pixels = np.asarray(image)
    if (pixels[..., 3] > 128).mean() < 0.05:
        return None
    rows, columns = np.where(pixels[..., 3] > 20)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    side = max(bottom - top, right - left)
    square = np.zeros((side, side, 4), dtype=np.float32)
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    square[y : y + bottom - top, x : x + right - left] = pixels[top:bottom, left:right] / 255
    square[..., :3] *= square[..., 3:]
    channels = [
        Image.fromarray(square[..., k]).resize((ICON_SIZE, ICON_SIZE), Image.Resampling.LANCZOS) for k in range(4)
    ]
    return np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1) * 255, 0, 255).astype(np.uint8)


def contact_sheet(rgba: np.ndarray, icons: Sequence[Icon], captions: Sequence[str], columns: int = 24) -> Image.Image:
    """Return a picture with one row of icons for each caption."""
    sheet = Image.new("RGB", (64 * columns, 64 * len(captions)), "white")
    for row, caption in enumerate(captions):
        chosen = [index for index, icon in enumerate(icons) if caption in icon.captions][:columns]
        for column, index in enumerate(chosen):
            pixels = rgba[index].astype(np.float32)
            opaque = pixels[..., :3] + 255 - pixels[..., 3:]
            sheet.paste(Image.fromarray(opaque.clip(0, 255).astype(np.uint8)), (column * 64, row * 64))
    return sheet


@dataclass
class Args:
    """Rasterise and caption the icon sets."""

    work: Path = WORK
    """Where everything is read and written."""


def build(
    work: Path, sources: Sequence[IconSource] = ICONS, names: IconSource = NAMES, registry: str = REGISTRY
) -> Mapping[str, int]:
    """Write the rows of all sets; return how many each style has."""
    concepts = read_concepts(fetch(names, work, registry))
    found = [
        (Icon(source.style, concept.captions, concept.group, source.held_out), drawing)
        for source in sources
        for concept, drawing in drawings(source, fetch(source, work, registry), concepts)
    ]
    with ProcessPoolExecutor() as pool:
        rasters = list(pool.map(rasterise, [drawing for _, drawing in found], chunksize=64))
    kept = [(icon, raster) for (icon, _), raster in zip(found, rasters, strict=True) if raster is not None]
    icons = [icon for icon, _ in kept]
    rgba = np.stack([raster for _, raster in kept])
    folder = work / "icons"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "rgba.npy", rgba)
    (folder / "icons.jsonl").write_text("\n".join(json.dumps(asdict(icon)) for icon in icons))
    contact_sheet(rgba, icons, ANIMALS).save(folder / "animals.png")
    return {source.style: sum(icon.style == source.style for icon in icons) for source in sources}


def main(args: Args) -> None:
    for style, count in build(args.work).items():
        print(f"{style:12} {count} icons")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
