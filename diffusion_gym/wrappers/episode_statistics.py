"""Returns and lengths of episodes, counted on the device."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import Tensor

from .. import transfer
from ..envs.lanes import lanes_to_reset
from .ended import ended_lanes


class EpisodeStatistics(VectorWrapper):
    """What Gymnasium's `RecordEpisodeStatistics` adds to info, of a torch vector environment, without a wait.

    Where episodes end, info has `episode`, a dict of `r` (returns, [num_envs] float32, on the device), `l` (lengths,
    [num_envs] int64) and `t` (seconds, [num_envs]; both NumPy), and the mask `_episode` of the lanes that ended; the
    other lanes have 0. Rewards that are deferred (`env.unwrapped.deferred_rewards()`) are not in the returns.

    Args:
        env: A vector environment of torch tensors whose info has `ended`: this package's, or behind `NumpyToTorch`.
    """

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        self._returns = torch.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, dtype=np.int64)
        self._began = np.zeros(self.num_envs)
        self._over = np.zeros(self.num_envs, dtype=bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes; the arguments are those of the environment."""
        mask = lanes_to_reset(options, num_envs=self.num_envs)
        result = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        self._begin(mask)
        return result

    def step(self, actions: Any) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Take one action in every lane."""
        observation, reward, terminated, truncated, info = self.env.step(actions)
        ended, before = ended_lanes(info), self._over
        if self.env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP:
            self._begin(before)
        counted = transfer.to_device(~before, reward.device)
        self._returns = transfer.to_device(self._returns, reward.device) + torch.where(counted, reward, 0.0)
        self._lengths += ~before
        now = ended & ~before
        if now.any():
            info = info | {"episode": self._statistics(now), "_episode": now.copy()}
        self._over = ended.copy()
        if self.env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP:
            self._begin(ended)
        return observation, reward, terminated, truncated, info

    def _begin(self, mask: np.ndarray) -> None:
        """Count from 0 in the lanes of the mask."""
        if mask.any():
            self._returns = self._returns.masked_fill(transfer.to_device(mask, self._returns.device), 0.0)
            self._lengths[mask] = 0
            self._began[mask] = time.perf_counter()
            self._over = self._over & ~mask

    def _statistics(self, mask: np.ndarray) -> Mapping[str, Any]:
        """Return the episodes of the lanes of the mask, and 0 for the others."""
        return {
            "r": torch.where(transfer.to_device(mask, self._returns.device), self._returns, 0.0),
            "l": np.where(mask, self._lengths, 0),
            "t": np.where(mask, time.perf_counter() - self._began, 0.0),
        }
