"""What is observed in a rollout and does not change within an episode, kept once where episodes share it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from diffusion_gym.transfer import to_device


@dataclass(frozen=True, eq=False)
class Constants:
    """What is observed of B episodes and does not change within one; equal rows are kept once.

    Args:
        values: [P, …] the distinct rows; of embeddings one for each prompt.
        rows: [B] int64 on the same device: the row of each episode.
    """

    values: Tensor
    rows: Tensor

    def __getitem__(self, episodes: Tensor | slice) -> Tensor:
        """Return the rows of some episodes, [M, …]."""
        return self.values[self.rows[episodes]]

    @classmethod
    def of(cls, values: "Constants | Tensor") -> "Constants":
        """Return constants as they are, and a plain row for each episode, [B, …], as constants."""
        return values if isinstance(values, Constants) else cls(values, torch.arange(len(values), device=values.device))

    def part(self, episodes: Tensor | slice) -> "Constants":
        """Return the constants of some of the episodes."""
        return Constants(self.values, self.rows[episodes])


@final
class DistinctRows:
    """What is constant within the episodes of a rollout, kept once for all episodes that share it.

    Embeddings (their names are diffusers') are kept once per prompt; those of negative prompts once, for an environment
    has one negative prompt. Anything else is kept for each episode.
    """

    def __init__(self) -> None:
        self._row_of_prompt: dict[int, int] = {}
        self._values: dict[str, list[Tensor]] = {}
        self._rows: dict[str, list[int]] = {}

    def add(self, constants: Mapping[str, Tensor], prompt_id: np.ndarray) -> None:
        """Take in what some lanes observe, [lanes, …] each, and their prompts, [lanes]."""
        prompt_rows, lanes_of_new_prompts = self._rows_of(prompt_id)
        for key, values in constants.items():
            parts, rows = self._values.setdefault(key, []), self._rows.setdefault(key, [])
            if not key.endswith("embeds"):
                kept, of_lanes = list(range(len(prompt_id))), list(range(len(rows), len(rows) + len(prompt_id)))
            elif key.startswith("negative_"):
                kept, of_lanes = [] if parts else [0], [0] * len(prompt_id)
            else:
                kept, of_lanes = lanes_of_new_prompts, prompt_rows
            if kept:
                parts.append(values[to_device(np.array(kept, dtype=np.int64), values.device)])
            rows.extend(of_lanes)

    def _rows_of(self, prompt_id: np.ndarray) -> tuple[list[int], list[int]]:
        """Return the row of each lane's prompt, and the lanes whose prompts are new: all that are in no set (−1)."""
        rows, new = [], []
        for lane, prompt in enumerate(prompt_id.tolist()):
            row = len(self._row_of_prompt)
            key = prompt if prompt >= 0 else -1 - row
            if key not in self._row_of_prompt:
                self._row_of_prompt[key] = row
                new.append(lane)
            rows.append(self._row_of_prompt[key])
        return rows, new

    def build(self) -> dict[str, Constants]:
        """Return the constants of all episodes."""
        return {
            key: Constants(torch.cat(parts), to_device(np.array(self._rows[key], dtype=np.int64), parts[0].device))
            for key, parts in self._values.items()
        }
