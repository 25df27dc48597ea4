"""Edit real icons in all ways, measure what can be measured, and show a few of them.

    python -m tools.emoji.edit_icons --model emoji_consistency --picture docs/editing.png

edits an icon of each of the 45 animals with 2, 4 and 8 steps and prints a table: the error of what is known, and the
PSNR of the rest against the icon, beside that of what the model was shown. It needs `build/emoji/icons`
(`python -m tools.emoji.icons`) and takes 3 CPU minutes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from diffusion_gym.consistency.editing import denoise, edit, interpolate
from diffusion_gym.consistency.operators import Colourisation, Inpainting, Operator, SuperResolution
from diffusion_gym.models import load_model
from diffusion_gym.models.base import DiffusionModel
from diffusion_gym.predictions import broadcast_to
from diffusion_gym.prompts.base import with_article
from diffusion_gym.rewards import to_uint8
from diffusion_gym.transitions import draw_noise

from .dataset import IMAGE_SIZE, IconData
from .icons import ANIMALS
from .sources import WORK

HALF = torch.arange(IMAGE_SIZE).expand(IMAGE_SIZE, IMAGE_SIZE) >= IMAGE_SIZE // 2
OPERATORS: Mapping[str, Operator] = {
    "inpainting": Inpainting(HALF),
    "colourisation": Colourisation(),
    "super-resolution ×4": SuperResolution(4),
}


@dataclass
class Args:
    """Edit real icons."""

    model: str = "emoji_consistency"
    """Its name or folder."""
    work: Path = WORK
    """Where the icons are."""
    picture: Path = WORK / "editing.png"
    """Where the picture is written."""
    shown: tuple[str, ...] = ("fox", "pig", "frog", "lion", "whale", "chicken", "tiger", "cat")
    """The animals in it."""
    num_steps: tuple[int, ...] = (2, 4, 8)
    """The numbers of steps; the picture has the last."""
    seed: int = 0
    """Of the icons, and of the noise."""


def psnr(images: Tensor, truth: Tensor) -> np.ndarray:
    """Return each image's peak signal-to-noise ratio in dB, [B]."""
    return -10 * (images - truth).square().flatten(1).mean(1).log10().numpy()


def seam(images: Tensor) -> float:
    """Return how far the first columns of the free half are from the last ones of the known half."""
    return float((images[..., IMAGE_SIZE // 2] - images[..., IMAGE_SIZE // 2 - 1]).abs().mean())


def mean_and_error(values: np.ndarray) -> str:
    """Return a mean, and its standard error over images."""
    return f"{values.mean():.1f} ± {values.std(ddof=1) / len(values) ** 0.5:.1f}"


def tabulate(model: DiffusionModel, icons: Tensor, prompts: list[str], args: Args) -> str:
    """Return the table of all operators and numbers of steps."""
    bicubic = F.interpolate(F.avg_pool2d(icons, 4), scale_factor=4, mode="bicubic").clamp(0, 1)
    lines = [
        "| edit | steps | largest error of the known | PSNR, dB | of what it was shown | |",
        "|---|---|---|---|---|---|",
    ]
    for name, operator in OPERATORS.items():
        rows = slice(IMAGE_SIZE // 2, None) if name == "inpainting" else slice(None)  # where there is something to draw
        shown = mean_and_error(psnr(operator.start(icons)[..., rows], icons[..., rows]))
        for space in ("pixels", "latents") if name == "inpainting" else ("pixels",):
            for num_steps in args.num_steps:
                edited = edit(model, icons, prompts, operator, num_steps=num_steps, space=space, seed=args.seed)
                known = (operator.transform(edited) - operator.transform(icons)).abs()
                error = float(known.masked_fill(operator.is_free(icons), 0.0).max())
                quality = mean_and_error(psnr(edited[..., rows], icons[..., rows]))
                beside = f"bicubic {mean_and_error(psnr(bicubic, icons))}" if "super" in name else ""
                if name == "inpainting":
                    beside = f"step at the seam {seam(edited) / seam(icons):.1f} times the icons'"
                lines.append(f"| {name}, in {space} | {num_steps} | {error:.1e} | {quality} | {shown} | {beside} |")
    autoencoder = mean_and_error(psnr(model.decode(model.encode(icons)), icons))
    lines.append(f"| the autoencoder alone | 0 | | {autoencoder} | | |")
    return "\n".join(lines)


def strokes_of(icons: Tensor) -> Tensor:
    """Return icons as strokes: 8×8 blocks of one of five levels in each channel."""
    return F.interpolate((F.avg_pool2d(icons, 8) * 5).round() / 5, scale_factor=8)


def picture(model: DiffusionModel, icons: Tensor, names: list[str], args: Args) -> plt.Figure:
    """Return a row of images for each edit, under what the model was shown."""
    prompts, num_steps = [with_article(name) for name in names], args.num_steps[-1]
    grid = model.schedule.timesteps(num_steps)[:-1].tolist()
    later = grid[len(grid) // 3 :]
    rows = {"icons": icons}
    for name, operator in OPERATORS.items():
        rows[f"known: {name}"] = operator.start(icons)
        rows[name] = edit(model, icons, prompts, operator, num_steps=num_steps, seed=args.seed)
    strokes = strokes_of(icons)
    rows["strokes"] = strokes
    rows[f"a picture from t = {later[0]:g}"] = edit(model, strokes, prompts, times=later, seed=args.seed)
    clean, middle = model.encode(icons), grid[len(grid) // 2]
    t = torch.full((len(icons),), middle)
    alpha, sigma = (broadcast_to(level(t), clean) for level in (model.schedule.alpha, model.schedule.sigma))
    noise = draw_noise(clean, [torch.Generator().manual_seed(1000 + index) for index in range(len(clean))])
    noisy = alpha * clean + sigma * noise
    rows[f"noise of t = {middle:g}"] = model.decode(noisy / alpha)
    rows["denoised in a step"] = denoise(model, noisy, prompts, times=(middle,), seed=args.seed)
    rows[f"two noises, {prompts[0]}"] = interpolate(model, prompts[0], len(icons), num_steps=num_steps)
    ends = (prompts[-1], prompts[0])
    rows[f"{ends[0]} to {ends[1]}"] = interpolate(model, ends, len(icons), seeds=(2, 2), num_steps=num_steps)
    figure, panels = plt.subplots(len(rows), figsize=(9, 0.85 * len(rows)), layout="constrained")
    for axes, (label, images) in zip(panels, rows.items(), strict=True):
        axes.imshow(np.hstack(list(to_uint8(images).numpy())))
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[], frame_on=False)
    return figure


@torch.no_grad()
def main(args: Args) -> None:
    data, model = IconData(args.work / "icons"), load_model(args.model)
    icons = data.batch(ANIMALS, torch.Generator().manual_seed(args.seed)).images
    print(tabulate(model, icons, [with_article(name) for name in ANIMALS], args))
    shown = [ANIMALS.index(name) for name in args.shown]
    figure = picture(model, icons[shown], list(args.shown), args)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=100, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
