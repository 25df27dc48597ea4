"""Draw samples of a model, through the package itself, and lay them out as a picture."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffusion_gym.models import DiffusionModel
from diffusion_gym.prompts import make_prompts
from diffusion_gym.rewards import to_uint8
from diffusion_gym.samplers import DDIM
from diffusion_gym.sampling import sample_latents
from diffusion_gym.schedules import NoiseSchedule
from diffusion_gym.transitions import draw_noise

from .training import autocast

GUIDANCE_SCALE = 4.0
CHUNK = 64

Grid = Callable[[NoiseSchedule, int], Tensor]


@torch.no_grad()
def draw_samples(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int = 20,
    guidance_scale: float = GUIDANCE_SCALE,
    grid: Grid | None = None,
) -> Tensor:
    """Return images [B, 3, 64, 64] in [0, 1]: deterministic steps from each seed's noise, by `autocast`.

    Consistency models draw by their own steps, with noise of the same seed.

    Args:
        model: The model.
        prompts: The B prompts.
        seeds: The B seeds.
        num_steps: Steps.
        guidance_scale: Of classifier-free guidance.
        grid: The times; None: the checkpoint's own.
    """
    texts = sorted(set(prompts))
    row = {text: index for index, text in enumerate(texts)}
    encoded = model.encode_prompts(texts)
    sampler = DDIM(0.0) if model.boundary_time is None else model.default_sampler
    times = model.schedule.timesteps(num_steps) if grid is None else grid(model.schedule, num_steps)
    images = []
    for start in range(0, len(prompts), CHUNK):
        part = slice(start, start + CHUNK)
        index = torch.tensor([row[prompt] for prompt in prompts[part]])
        conditioning = {key: value[index] for key, value in encoded.items()}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        noise = draw_noise(torch.empty(len(index), *model.latent_shape), generators)
        with autocast():
            latents = sample_latents(
                model,
                noise,
                conditioning,
                times,
                sampler=sampler,
                generators=generators,
                guidance_scale=guidance_scale,
            )
        images.append(model.decode(latents))
    return torch.cat(images)


def lay_out(images: Tensor, labels: Sequence[str], *, per_label: int, columns: int = 5) -> Image.Image:
    """Return labelled groups of images as one picture, read row by row."""
    side = images.shape[-1]
    pixels = to_uint8(images).numpy()
    width, height = per_label * side + 6, side + 14
    rows = -(-len(labels) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, label in enumerate(labels):
        x, y = index % columns * width, index // columns * height
        draw.text((x + 2, y), label, fill="black")
        for k in range(per_label):
            sheet.paste(Image.fromarray(pixels[index * per_label + k]), (x + k * side, y + 13))
    return sheet


def draw_grid(
    model: DiffusionModel, prompts: Sequence[str] | None = None, *, per_prompt: int = 4, num_steps: int = 20
) -> Image.Image:
    """Return a labelled grid of samples, of the 45 animals unless told otherwise; seeds 0, 1, … on and on."""
    prompts = list(prompts or make_prompts("simple_animals"))
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    images = draw_samples(model, repeated, list(range(len(repeated))), num_steps=num_steps)
    return lay_out(images, prompts, per_label=per_prompt)
