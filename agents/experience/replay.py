"""Finished images with their rewards: what algorithms learn from that need no trajectories."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_gym.lines import read_json_lines
from diffusion_gym.models.base import DiffusionModel
from diffusion_gym.transfer import to_device

from .constants import Constants
from .rollouts import Rollout

METADATA_FILE = "metadata.jsonl"
_IMAGES_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Replay:
    """N finished samples.

    Where many processes train together, latents and constants may be only a share of M ≤ N that this one has; rewards
    and prompts are of all samples, and indices always count all of them.

    Args:
        latents: [M, C, H, W] the clean latents x_0.
        constants: [M, ...] each: what a policy observes of the prompts (embeddings, or their indices), kept once each.
        rewards: [N] float32.
        prompts: [N] int64 on the host: equal numbers are equal prompts.
        first_sample: The index of the first sample whose latents are here.
    """

    latents: Tensor
    constants: Mapping[str, Constants]
    rewards: Tensor
    prompts: np.ndarray
    first_sample: int = 0

    def __post_init__(self) -> None:
        constants = {key: Constants.of(value) for key, value in self.constants.items()}
        object.__setattr__(self, "constants", constants)

    @property
    def is_whole(self) -> bool:
        """Whether the latents of all samples are here: nobody has shared them out among processes."""
        return len(self.latents) == len(self)

    def __len__(self) -> int:
        return len(self.rewards)

    def is_here(self, rows: np.ndarray) -> np.ndarray:
        """Return whether the latents of samples are in this process, bool of the same shape."""
        return (rows >= self.first_sample) & (rows < self.first_sample + len(self.latents))

    def inputs(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the latents and the constants of samples, [M, …] each, given their indices [M] on the device."""
        rows = index - self.first_sample
        return self.latents[rows], {key: value[rows] for key, value in self.constants.items()}

    def share(self, rows: range) -> "Replay":
        """Return the replay with the latents and constants of a contiguous part of its samples alone."""
        part = slice(rows.start - self.first_sample, rows.stop - self.first_sample)
        constants = {key: value.part(part) for key, value in self.constants.items()}
        return replace(self, latents=self.latents[part], constants=constants, first_sample=rows.start)

    @classmethod
    def from_rollout(cls, rollout: Rollout) -> "Replay":
        """Return the ends of a rollout of the denoising MDP, whose last action is x_0: those with a valid reward."""
        device = rollout.ends.device
        valid = to_device(np.flatnonzero(rollout.valid), device)
        valid_here = to_device(np.flatnonzero(rollout.valid[rollout.lanes_here]), device)
        return cls(
            latents=rollout.ends[rollout.lanes_here][valid_here].float(),
            constants={key: value.part(valid_here) for key, value in rollout.constants.items()},
            rewards=rollout.returns[valid],
            prompts=rollout.prompt_id[rollout.valid],
            first_sample=int(rollout.valid[: rollout.first_episode].sum()),
        )

    @classmethod
    def from_folder(cls, folder: Path | str, model: DiffusionModel, *, negative_prompt: str = "") -> "Replay":
        """Return images that lie in a folder, encoded by a model's autoencoder.

        The folder is Hugging Face's `imagefolder`: a `metadata.jsonl` with a line for each image, here
        `{"file_name": "0001.png", "prompt": "a cat", "reward": 2.31}`.

        Args:
            folder: The folder.
            model: The model that is to learn from the images; they are resized to what it draws.
            negative_prompt: What the guidance of the policy moves away from.

        Raises:
            TypeError: `model` is no model.
            FileNotFoundError: there is no `metadata.jsonl`, or an image is missing.
            ValueError: there are no lines, or one is not such an object; the reward is to be a finite number.
        """
        if not isinstance(model, DiffusionModel):
            raise TypeError(f"model must be a DiffusionModel, such as env.unwrapped.model; got {model!r}")
        lines = _read_metadata(Path(folder))
        files = [Path(folder) / line["file_name"] for line in lines]
        texts = sorted({line["prompt"] for line in lines})
        prompts = np.array([texts.index(line["prompt"]) for line in lines], dtype=np.int64)
        embeddings = model.encode_prompts(texts, negative_prompt)
        rows = to_device(prompts, model.device)
        return cls(
            latents=torch.cat([model.encode(images.to(model.device)) for images in _read_images(files, model)]),
            constants={key: Constants(values, rows) for key, values in embeddings.items()},
            rewards=torch.tensor([float(line["reward"]) for line in lines], device=model.device),
            prompts=prompts,
        )


def _read_metadata(folder: Path) -> list[dict[str, Any]]:
    """Return what a folder's metadata file says of each image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no lines, or one lacks a text or a finite reward.
    """
    file = folder / METADATA_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {METADATA_FILE} with file_name, prompt and reward of each image")
    lines = []
    for number, line, entry in read_json_lines(file):
        if not (
            all(isinstance(entry.get(key), str) for key in ("file_name", "prompt"))
            and isinstance(entry.get("reward"), int | float)
            and math.isfinite(entry["reward"])
        ):
            raise ValueError(
                f'{file}, line {number}: expected a JSON object with the texts "file_name" and "prompt" and the finite '
                f'number "reward", got {line[:80]}'
            )
        lines.append(entry)
    if not lines:
        raise ValueError(f"{file} is empty: it needs a line for each image")
    return lines


def _read_images(files: Sequence[Path], model: DiffusionModel) -> Iterator[Tensor]:
    """Yield images as a model draws them, [at most 32, 3, H, W] in [0, 1] on the host.

    Raises:
        FileNotFoundError: an image is missing.
    """
    _, height, width = model.image_shape
    for start in range(0, len(files), _IMAGES_AT_ONCE):
        pixels = []
        for file in files[start : start + _IMAGES_AT_ONCE]:
            with Image.open(file) as image:
                pixels.append(np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)))
        yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
