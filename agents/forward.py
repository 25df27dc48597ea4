"""What algorithms share that learn on the forward process: from finished images, noised anew, without trajectories."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from typing_extensions import Unpack

from .algorithm import Algorithm
from .options import Options
from .policies import DenoisingPolicy, Policy
from .replay import Replay

Noised = tuple[Tensor, tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]]


class ForwardOptions(Options, total=False):
    """The keywords that they all take; see `ForwardProcessAlgorithm`."""

    noise_draws: int


class ForwardProcessAlgorithm(Algorithm):
    """An algorithm that trains a denoiser on finished images.

    Args are those of `Algorithm`, and:
        noise_draws: Times and noises at which each sample counts in an update (DiffusionNFT's code: as many as the
            sampler has steps; RWR's: 1). One says little of a sample.

    Raises:
        TypeError, ValueError: as `Algorithm`; or the policy is no `DenoisingPolicy`, or the environment's action is not
            the next latents.
    """

    policy: DenoisingPolicy

    def __init__(
        self,
        policy: Policy,
        env: VectorEnv,
        *,
        n_epochs: int,
        own: Mapping[str, Any],
        noise_draws: int = 1,
        **options: Unpack[Options],
    ) -> None:
        own = {**own, "noise_draws": noise_draws}
        super().__init__(policy, env, log_prob_reduction="mean", n_epochs=n_epochs, own=own, **options)
        if noise_draws < 1:
            raise ValueError(f"noise_draws must be at least 1, got {noise_draws}")
        self.noise_draws = noise_draws
        name = type(self).__name__
        if not isinstance(policy, DenoisingPolicy):
            raise TypeError(f"{name} trains a denoiser: policy must be a DenoisingPolicy, got {type(policy).__name__}")
        if not env.metadata.get("action_is_next_latents"):
            raise ValueError(f"{name} learns from the images of DenoisingMDP-v0, got {env}")

    def _batches(self, rows: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the rows of each update, `noise_draws` times each: shuffled passes, `batch_size` at a time."""
        for _ in range(self.n_epochs):
            order = self._shuffled(rows, rng)
            for start in range(0, len(order), self.batch_size):
                yield np.tile(order[start : start + self.batch_size], self.noise_draws)

    def _noised(self, replay: Replay, rows: np.ndarray, rng: np.random.Generator) -> Iterator[Noised]:
        """Yield the indices of each micro-batch and what `predict_noised` takes: a time and a noise for each sample.

        Times and noises are drawn for all rows, and only those yielded whose latents are here.
        """
        schedule, device = self.policy.model.schedule, self.policy.device
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        times = schedule.training_times(torch.rand(len(rows), generator=generator))
        noise = torch.randn(len(rows), *replay.latents.shape[1:], generator=generator)
        here = np.flatnonzero(replay.own(rows))
        for start in range(0, len(here), self.micro_batch_size):
            part = here[start : start + self.micro_batch_size]
            index = torch.from_numpy(rows[part]).to(device)
            latents, constants = replay.inputs(index)
            yield index, (latents, times[part].to(device), noise[part].to(device), constants)
