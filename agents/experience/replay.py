"""Finished images with their rewards: what algorithms learn from that need no trajectories."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_gym.lines import read_json_lines
from diffusion_gym.models.base import DiffusionModel

from .rollouts import Constants, Rollout

METADATA_FILE = "metadata.jsonl"
_CHUNK = 32


@dataclass(frozen=True, eq=False)
class Replay:
    """N finished samples.

    Where many processes train together, latents and constants may be only a share of M ≤ N that this one has; rewards
    and prompts are of all, and indices always count all samples.

    Args:
        latents: [M, C, H, W] the clean latents x_0.
        constants: [M, ...] each: what a policy observes of the prompts (embeddings, or their indices), kept once each.
        rewards: [N] float32.
        prompts: [N] int64 on the host: equal numbers are equal prompts.
        first: The index of the first sample whose latents are here.
    """

    latents: Tensor
    constants: Mapping[str, Constants]
    rewards: Tensor
    prompts: np.ndarray
    first: int = 0

    def __post_init__(self) -> None:
        kept = {key: Constants.of(value) for key, value in self.constants.items()}
        object.__setattr__(self, "constants", kept)

    def __len__(self) -> int:
        return len(self.rewards)

    def own(self, rows: np.ndarray) -> np.ndarray:
        """Return which of the samples have their latents here, [M] bool."""
        return (rows >= self.first) & (rows < self.first + len(self.latents))

    def inputs(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the latents and the constants of samples, given their indices on the device."""
        index = index - self.first
        return self.latents[index], {key: value[index] for key, value in self.constants.items()}

    def share(self, rows: range) -> "Replay":
        """Return the replay with the latents and constants of a contiguous part of its samples."""
        part = slice(rows.start - self.first, rows.stop - self.first)
        constants = {key: value.part(part) for key, value in self.constants.items()}
        return replace(self, latents=self.latents[part], constants=constants, first=rows.start)

    @classmethod
    def from_rollout(cls, rollout: Rollout) -> "Replay":
        """Return the ends of a rollout of the denoising MDP, whose last action is x_0: those with a valid reward."""
        here = slice(rollout.first, rollout.first + rollout.actions.shape[1])
        own, kept = (torch.from_numpy(np.flatnonzero(rows)) for rows in (rollout.valid[here], rollout.valid))
        own, kept = own.to(rollout.ends.device), kept.to(rollout.ends.device)
        return cls(
            rollout.ends[here][own].float(),
            {key: Constants(value.values, value.rows[own]) for key, value in rollout.constants.items()},
            rollout.returns[kept],
            rollout.prompt_id[rollout.valid],
            int(rollout.valid[: rollout.first].sum()),
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
        folder = Path(folder)
        if not (folder / METADATA_FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {METADATA_FILE} with file_name, prompt and reward of each image")
        lines = _read_lines(folder / METADATA_FILE)
        _, height, width = model.image_shape
        parts = []
        for start in range(0, len(lines), _CHUNK):
            pixels = []
            for line in lines[start : start + _CHUNK]:
                with Image.open(folder / line["file_name"]) as image:
                    pixels.append(np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)))
            images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
            parts.append(model.encode(images.to(model.device)))
        texts = sorted({line["prompt"] for line in lines})
        index = torch.tensor([texts.index(line["prompt"]) for line in lines])
        encoded = model.encode_prompts(texts, negative_prompt)
        return cls(
            latents=torch.cat(parts),
            constants={key: Constants(value, index.to(model.device)) for key, value in encoded.items()},
            rewards=torch.tensor([float(line["reward"]) for line in lines], device=model.device),
            prompts=index.numpy(),
        )


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """Return what a metadata file says of each image, checked."""
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
