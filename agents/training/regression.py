"""What algorithms share that learn on the forward process: from finished images, noised anew, without trajectories."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from typing_extensions import Unpack

from ..experience.replay import Replay
from ..policies import DenoisingPolicy, Policy
from .algorithm import Algorithm
from .options import Options, require_number, require_whole

Noised = tuple[Tensor, tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]]


class ForwardOptions(Options, total=False):
    """The keywords that they all take; see `ForwardProcessAlgorithm`."""

    noise_draws: int
    time_range: tuple[float, float]
    common_noise: bool


class ForwardProcessAlgorithm(Algorithm):
    """An algorithm that trains a denoiser on finished images.

    Args are those of `Algorithm`, and:
        noise_draws: Times and noises at which each sample counts in an update (DiffusionNFT's code: as many as the
            sampler has steps; RWR's: 1). One says little of a sample.
        time_range: From where to where of the process the times are drawn, in [0, 1]: 0 is its clean end, 1 pure noise
            (published: all of it).
        common_noise: Noise the samples of a prompt alike: with one time and one noise at each draw. What they have in
            common then cancels out of their contrast (common random numbers), and their updates vary less.

    Raises:
        TypeError, ValueError: as `Algorithm`; or an argument is out of its range, or the policy is no
            `DenoisingPolicy`, or the environment's action is not the next latents.
    """

    policy: DenoisingPolicy
    keep = "ends"

    def __init__(
        self,
        policy: Policy,
        env: VectorEnv,
        *,
        n_epochs: int,
        own: Mapping[str, Any],
        noise_draws: int = 1,
        time_range: tuple[float, float] = (0.0, 1.0),
        common_noise: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {**own, "noise_draws": noise_draws, "time_range": list(time_range), "common_noise": common_noise}
        super().__init__(policy, env, log_prob_reduction="mean", n_epochs=n_epochs, own=own, **options)
        require_whole(1, noise_draws=noise_draws)
        for time in time_range:
            require_number("[0, 1]", time_range=time)
        if len(time_range) != 2 or not time_range[0] < time_range[1]:
            raise ValueError(f"time_range must be (low, high) with 0 ≤ low < high ≤ 1, got {time_range}")
        self.noise_draws = noise_draws
        self.time_range = (time_range[0], time_range[1])
        self.common_noise = common_noise

    def _check_fit(self) -> None:
        name, kind = type(self).__name__, type(self.policy).__name__
        if not isinstance(self.policy, DenoisingPolicy):
            raise TypeError(f"{name} trains a denoiser: policy must be a DenoisingPolicy, got {kind}")
        if not self.env.metadata.get("action_is_next_latents"):
            raise ValueError(f"{name} learns from the images of DenoisingMDP-v0, got {self.env}")
        super()._check_fit()

    def _batches(self, rows: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the rows of each update, `noise_draws` times each: shuffled passes, about `batch_size` at a time.

        Where that does not divide the rows, all updates are of about one size: a last one of a few rows would move the
        weights as far as the others do.
        """
        for _ in range(self.n_epochs):
            order = self._shuffled(rows, rng)
            for batch in np.array_split(order, max(1, round(len(order) / self.batch_size))):
                yield np.tile(batch, self.noise_draws)

    def _noised_alike(self, replay: Replay, rows: np.ndarray) -> Tensor:
        """Return for each row of an update which time and noise it gets: rows with equal numbers get the same."""
        if not self.common_noise:
            return torch.arange(len(rows))
        draws = np.repeat(np.arange(self.noise_draws), len(rows) // self.noise_draws)
        numbers = draws * (replay.prompts.max() + 1) + replay.prompts[rows]
        return torch.from_numpy(np.unique(numbers, return_inverse=True)[1])

    def _noised(self, replay: Replay, rows: np.ndarray, rng: np.random.Generator) -> Iterator[Noised]:
        """Yield the indices of each micro-batch and what `predict_noised` takes: a time and a noise for each sample.

        Times and noises are drawn for all rows, and only those yielded whose latents are here.
        """
        schedule, device = self.policy.model.schedule, self.policy.device
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        alike = self._noised_alike(replay, rows)
        count = int(alike.max()) + 1
        times = schedule.training_times(torch.rand(count, generator=generator), within=self.time_range)[alike]
        noise = torch.randn(count, *replay.latents.shape[1:], generator=generator)[alike]
        here = np.flatnonzero(replay.is_here(rows))
        for start in range(0, len(here), self.micro_batch_size):
            part = here[start : start + self.micro_batch_size]
            index = torch.from_numpy(rows[part]).to(device)
            latents, constants = replay.inputs(index)
            yield index, (latents, times[part].to(device), noise[part].to(device), constants)
