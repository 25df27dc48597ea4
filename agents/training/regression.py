"""What algorithms share that learn on the forward process: from finished images, noised anew, without trajectories."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from torch import Tensor

from diffusion_gym import transfer
from diffusion_gym.checks import checked_integer, checked_number
from diffusion_gym.models.base import Prediction
from diffusion_gym.parts import Part

from ..experience.replay import Replay
from ..experience.rollouts import Keep, Rollout
from ..logs.diagnostics import Metrics, mean_of
from ..policies import DenoisingPolicy
from .algorithm import Algorithm


@final
@dataclass(frozen=True, kw_only=True)
class Noising(Part):
    """How finished images are noised for a regression: x_t = α_t·x_0 + σ_t·ε.

    Args:
        draws: Times and noises at which each sample counts in an update (DiffusionNFT's code: as many as the sampler
            has steps; RWR's: 1). One says little of a sample.
        time_range: From where to where of the process the times are drawn, in [0, 1]: 0 is its clean end, 1 pure noise
            (published: all of it).
        common: Noise the samples of a prompt alike: with one time and one noise at each draw. What they have in common
            then cancels out of their contrast (common random numbers), and their updates vary less.
        guidance_scale: Of the prediction that is regressed; 1: without guidance; None: the policy's.

    Raises:
        ValueError: a number is out of its range.
    """

    draws: int = 1
    time_range: tuple[float, float] = (0.0, 1.0)
    common: bool = False
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        checked_integer("draws", self.draws, at_least=1)
        for time in self.time_range:
            checked_number("time_range", time, "[0, 1]")
        if len(self.time_range) != 2 or not self.time_range[0] < self.time_range[1]:
            raise ValueError(f"time_range must be (low, high) with 0 ≤ low < high ≤ 1, got {self.time_range}")
        if self.guidance_scale is not None:
            checked_number("guidance_scale", self.guidance_scale, "[0, inf)")


@final
@dataclass(frozen=True, eq=False)
class Noised:
    """Some of a replay's samples, noised.

    Args:
        rows: [M] int64 on the device: which samples.
        clean: [M, C, H, W] x_0.
        t: [M] the times.
        noise: [M, C, H, W] ε.
        constants: [M, …] what a policy observes of the prompts.
        guidance_scale: Of predictions for them; None: the policy's.
    """

    rows: Tensor
    clean: Tensor
    t: Tensor
    noise: Tensor
    constants: Mapping[str, Tensor]
    guidance_scale: float | None

    def predicted_by(self, policy: DenoisingPolicy) -> Prediction:
        """Return what a policy predicts for them."""
        return policy.predict_noised(self.clean, self.t, self.noise, self.constants, guidance_scale=self.guidance_scale)


@dataclass(kw_only=True, eq=False, repr=False)
class Regression(Algorithm):
    """An algorithm that trains a denoiser on finished images: a subclass gives `weights_of` and `losses_of`.

    An update learns from `batch_size` samples, each noised to a time t of its own with an ε of its own, unless
    `noising` says otherwise; its gradient is the mean over them and their noises. What `losses_of` returns beside the
    loss has to be named in `logged`; `rows_of` may leave samples out, `metrics_of` log something of the weights.

    Args:
        policy: The denoiser that is trained.
        noising: At which times, and with how many noises, each image counts.
    """

    policy: DenoisingPolicy = field(kw_only=False)
    noising: Noising = Noising()

    def __post_init__(self) -> None:
        if not isinstance(self.noising, Noising):
            raise TypeError(f"noising must be a part, such as Noising(…); got {self.noising!r}")
        super().__post_init__()

    def check_fit(self) -> None:
        """Raise TypeError if the policy is no denoiser, ValueError if the action is not the next latents."""
        name, kind = type(self).__name__, type(self.policy).__name__
        if not self.policy.moves_latents:
            raise TypeError(f"{name} trains a denoiser: policy must be a DenoisingPolicy, got {kind}")
        if not self.base_env.action_is_next_latents:
            raise ValueError(f"{name} learns from the images of DenoisingMDP-v0, got {self.env}")
        super().check_fit()

    @property
    def keep(self) -> Keep:
        """The images alone."""
        return "ends"

    @abstractmethod
    def weights_of(self, replay: Replay) -> Tensor:
        """Return what each sample counts, [N]; those that count 0 may be left out by `rows_of`."""

    @abstractmethod
    def losses_of(self, noised: Noised, weights: Tensor) -> dict[str, Tensor]:
        """Return the "loss" of each sample, [M], with gradients; and what else is logged of each, [M] each.

        Args:
            noised: The samples.
            weights: [M] what `weights_of` returned for them.
        """

    @property
    def logged(self) -> tuple[str, ...]:
        """The names of what `losses_of` returns."""
        return ("loss",)

    def rows_of(self, weights: Tensor) -> np.ndarray:
        """Return the samples that are learnt from: all of them."""
        return np.arange(len(weights))

    def metrics_of(self, weights: Tensor) -> Metrics:
        """Return what is logged of the weights: nothing."""
        return {}

    def train(self, rollout: Rollout) -> Metrics:
        """Update the policy from one rollout's images."""
        return self.fit(Replay.from_rollout(rollout))

    def fit(self, replay: Replay) -> Metrics:
        """Update the policy from finished images: `n_epochs` passes, one update per `batch_size` of those that count.

        Called by `learn` with a rollout's images; call it with `Replay.from_folder` to learn from a folder. Of many
        processes each is to be given the whole folder, and learns from its share.

        Raises:
            TypeError, ValueError: it is no replay, or one of another model, or a reward is not finite.
        """
        self._check_replay(replay)
        if replay.is_whole:
            replay = replay.share(self.processes.share(len(replay)))
        rng = self.update_generator(self.num_updates)  # a folder may be learnt from again and again
        weights = self.weights_of(replay)
        batches = self._batches(self.rows_of(weights), rng)
        means = mean_of(self._update(replay, weights, rows, rng) for rows in batches)
        return {**means, **self.metrics_of(weights)}

    def _check_replay(self, replay: Replay) -> None:
        if not isinstance(replay, Replay):
            raise TypeError(f"fit needs a Replay, such as Replay.from_folder(folder, policy.model); got {replay!r}")
        found, needed = tuple(replay.latents.shape[1:]), self.policy.model.latent_shape
        if found != needed:
            raise ValueError(f"the replay's latents must be the policy's, of shape {needed}; got {found}")
        finite = transfer.to_host(replay.rewards.isfinite())
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            raise ValueError(
                f"the replay's rewards must be finite, got {transfer.to_host(replay.rewards)[row].item()} in row {row}"
            )

    def _batches(self, rows: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the rows of each update, `draws` times each: shuffled passes, about `batch_size` at a time.

        Where that does not divide the rows, all updates are of about one size: a last one of a few rows would move the
        weights as far as the others do.
        """
        for _ in range(self.n_epochs):
            order = self.shuffled(rows, rng)
            for batch in np.array_split(order, max(1, round(len(order) / self.sizes.batch))):
                yield np.tile(batch, self.noising.draws)

    def _update(self, replay: Replay, weights: Tensor, rows: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """Make one optimizer step from some of the samples; return its scalars."""
        totals = {name: torch.zeros((), device=self.policy.device) for name in self.logged}
        for noised in self._noised(replay, rows, rng):
            losses = self.losses_of(noised, weights[noised.rows])
            loss = losses["loss"].sum() / len(rows)
            self.updates.backward(loss)
            for name, values in losses.items():
                totals[name] += values.detach().sum() / len(rows)
        return self.processes.sums(totals) | {"grad_norm": self.updates.apply()}

    def _noised(self, replay: Replay, rows: np.ndarray, rng: np.random.Generator) -> Iterator[Noised]:
        """Yield the samples in micro-batches, a time and a noise drawn for each.

        Times and noises are drawn for all rows, and only those yielded whose latents are here. Processes that share
        weights yield equally often, some of them nothing.
        """
        schedule, device = self.policy.model.schedule, self.policy.device
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        alike = self._noised_alike(replay, rows)
        count = int(alike.max()) + 1
        uniform = torch.rand(count, generator=generator)
        times = schedule.training_times(uniform, within=self.noising.time_range)[alike]
        noise = torch.randn(count, *replay.latents.shape[1:], generator=generator)[alike]
        here = np.flatnonzero(replay.is_here(rows))
        longest = self.processes.most(len(here)) if self.processes.share_weights else len(here)
        for start in range(0, longest, self.sizes.micro_batch):
            part = here[start : start + self.sizes.micro_batch]
            index = torch.from_numpy(rows[part]).to(device)
            latents, constants = replay.inputs(index)
            scale = self.noising.guidance_scale
            yield Noised(index, latents, times[part].to(device), noise[part].to(device), constants, scale)

    def _noised_alike(self, replay: Replay, rows: np.ndarray) -> Tensor:
        """Return for each row of an update which time and noise it gets: rows with equal numbers get the same."""
        if not self.noising.common:
            return torch.arange(len(rows))
        draws = np.repeat(np.arange(self.noising.draws), len(rows) // self.noising.draws)
        numbers = draws * (replay.prompts.max() + 1) + replay.prompts[rows]
        return torch.from_numpy(np.unique(numbers, return_inverse=True)[1])
