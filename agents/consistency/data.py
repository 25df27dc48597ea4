"""What consistency functions learn from: clean latents with their prompts, and trajectories of a teacher."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import final

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_gym.checks import checked_integer
from diffusion_gym.models.base import DiffusionModel
from diffusion_gym.precision import has_fast_bf16
from diffusion_gym.samplers import DDIM
from diffusion_gym.transitions import draw_noise, transition

from ..experience.seeding import Stream, derived_generator
from ..runs.files import replaced_folder

_FILE = "trajectories.safetensors"
_PICTURES = (".jpeg", ".jpg", ".png", ".webp")


@final
@dataclass(frozen=True, eq=False)
class Latents:
    """Clean latents and their prompts.

    Args:
        latents: [M, C, h, w] x_0, in any precision.
        prompts: [M] the prompt of each.

    Raises:
        ValueError: there are none, or not a prompt for each.
    """

    latents: Tensor
    prompts: Sequence[str]

    def __post_init__(self) -> None:
        if not len(self.latents) or len(self.latents) != len(self.prompts):
            raise ValueError(
                f"a prompt is needed for each of the latents; got {len(self.latents)} and {len(self.prompts)}"
            )

    def __len__(self) -> int:
        return len(self.latents)

    def __add__(self, other: "Latents") -> "Latents":
        latents = torch.cat([self.latents, other.latents.to(self.latents)])
        return Latents(latents, [*self.prompts, *other.prompts])

    def __mul__(self, times: int) -> "Latents":
        return Latents(self.latents.repeat(times, *[1] * (self.latents.ndim - 1)), [*self.prompts] * times)

    @classmethod
    def of_images(cls, model: DiffusionModel, images: Sequence[Image.Image], prompts: Sequence[str]) -> "Latents":
        """Return the latents of pictures: each is cut to a square of its middle, and resized to the model's size."""
        height, width = model.image_size
        latents = []
        for start in range(0, len(images), 64):
            pixels = [_resized(image, height, width) for image in images[start : start + 64]]
            latents.append(model.encode(torch.stack(pixels).to(model.device)).half().cpu())
        return cls(torch.cat(latents) if latents else torch.empty(0, *model.latent_shape), list(prompts))

    @classmethod
    def of_folder(
        cls, model: DiffusionModel, folder: str | Path, *, prompt: Callable[[Path], str] | None = None
    ) -> "Latents":
        """Return the latents of a folder's pictures, in subfolders too.

        Args:
            model: The model that is to draw such pictures.
            folder: Of `.png`, `.jpg`, `.webp` files.
            prompt: The prompt of a file; None: the text in a `.txt` file of its name beside it, else the name of its
                folder.

        Raises:
            FileNotFoundError: there is no picture.
        """
        files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _PICTURES)
        if not files:
            raise FileNotFoundError(f"{folder} holds no pictures ({', '.join(_PICTURES)})")
        prompts = [(prompt or _prompt_beside)(file) for file in files]
        return cls.of_images(model, [Image.open(file) for file in files], prompts)

    @classmethod
    def of_dataset(
        cls,
        model: DiffusionModel,
        name: str,
        *,
        split: str = "train",
        image: str = "image",
        prompt: str = "text",
        count: int | None = None,
    ) -> "Latents":
        """Return the latents of a dataset of the Hugging Face Hub, or of a folder that `datasets` reads.

        Args:
            model: The model that is to draw such pictures.
            name: The dataset's id, or a folder.
            split: Which part.
            image: The column of pictures.
            prompt: The column of prompts; names of classes are taken for their numbers.
            count: How many of the first rows; None: all.

        Raises:
            ImportError: `datasets` is missing.
            ValueError: there is no such column.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError("Latents.of_dataset needs datasets: pip install 'diffusion-gym[datasets]'") from error
        rows = datasets.load_dataset(name, split=split)
        for column in (image, prompt):
            if column not in rows.column_names:
                raise ValueError(f"{name} has no column {column!r}: it has {', '.join(rows.column_names)}")
        rows = rows if count is None else rows.select(range(min(count, len(rows))))
        names = getattr(rows.features[prompt], "names", None)
        prompts = [names[value] if names else str(value) for value in rows[prompt]]
        return cls.of_images(model, list(rows[image]), prompts)


def _resized(image: Image.Image, height: int, width: int) -> Tensor:
    """Return a picture [3, height, width] in [0, 1], cut to the middle."""
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    cut = image.convert("RGB").resize(size, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255


def _prompt_beside(file: Path) -> str:
    text = file.with_suffix(".txt")
    return text.read_text().strip() if text.is_file() else file.parent.name


@final
@dataclass(frozen=True, eq=False)
class Trajectories:
    """A teacher's deterministic trajectories from noise to image.

    Args:
        latents: [M, S + 1, C, h, w] x at each time, float16; the last is the end.
        times: [S + 1] falling.
        prompts: [M] the prompt of each.
    """

    latents: Tensor
    times: Tensor
    prompts: Sequence[str]

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def ends(self) -> Latents:
        """The teacher's own samples."""
        return Latents(self.latents[:, -1], self.prompts)

    def save(self, folder: str | Path) -> None:
        """Write them into a folder, whole or not at all."""
        with replaced_folder(Path(folder)) as partial:
            tensors = {"latents": self.latents.contiguous(), "times": self.times}
            save_file(tensors, partial / _FILE, metadata={"prompts": json.dumps(list(self.prompts))})

    @classmethod
    def load(cls, folder: str | Path) -> "Trajectories":
        """Return what `save` wrote.

        Raises:
            FileNotFoundError: there is nothing.
        """
        with safe_open(Path(folder) / _FILE, framework="pt") as opened:
            prompts = json.loads(opened.metadata()["prompts"])
            return cls(opened.get_tensor("latents"), opened.get_tensor("times"), prompts)

    @classmethod
    @torch.no_grad()
    def draw(
        cls,
        model: DiffusionModel,
        prompts: Sequence[str],
        *,
        times: Tensor | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 64,
        seed: int = 0,
        cache: str | Path | None = None,
    ) -> "Trajectories":
        """Return a model's trajectories by DDIM with η = 0, one of each prompt.

        Args:
            model: The teacher.
            prompts: [M] the prompts.
            times: [S + 1] falling; a student that starts from pure noise at the first of them sees in training what it
                will see then. None: the model's own of 20 steps.
            guidance_scale: None: the model's default.
            batch_size: Trajectories that are drawn together; they do not depend on it.
            seed: Of the noises.
            cache: A folder where they are kept: if they are there, they are not drawn again.

        Raises:
            ValueError: those in the cache have other prompts or times.
        """
        checked_integer("batch_size", batch_size, at_least=1)
        times = model.schedule.timesteps(20) if times is None else times.double()
        if cache is not None and (Path(cache) / _FILE).is_file():
            kept = cls.load(cache)
            if list(kept.prompts) != list(prompts) or not torch.equal(kept.times, times):
                raise ValueError(f"{cache} holds trajectories of other prompts or times: remove it, or give another")
            return kept
        scale = model.guidance_scale_of(guidance_scale)
        parts = []
        for start in range(0, len(prompts), batch_size):
            conditioning = model.encode_prompts(prompts[start : start + batch_size])
            indices = range(start, min(start + batch_size, len(prompts)))
            generators = [derived_generator(seed, Stream.DATA, index) for index in indices]
            x = draw_noise(torch.empty(len(indices), *model.latent_shape, device=model.device), generators)
            path = [model.schedule.initial_std * x]
            for pair in pairwise(times.float()):
                t, s = (time.to(model.device).expand(len(x)) for time in pair)
                with torch.autocast(model.device.type, torch.bfloat16, enabled=has_fast_bf16(model.device)):
                    prediction = model.denoise(path[-1], t, conditioning, guidance_scale=scale)
                step = transition(prediction.x0, prediction.epsilon, DDIM(0.0).scales(model.schedule, t, s))
                path.append(step.mean.float())
            parts.append(torch.stack(path, 1).half().cpu())
        drawn = cls(torch.cat(parts), times, list(prompts))
        if cache is not None:
            drawn.save(cache)
        return drawn
