"""Rollouts: the part that says how they are collected, and the whole episodes, time-major, that they are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffusion_gym.checks import checked_integer
from diffusion_gym.parts import Part
from diffusion_gym.transfer import to_device

from .constants import Constants
from .storage import Storage

Keep = Literal["steps", "ends"]
PromptSampling = Literal["random", "round_robin"]
RolloutDtype = Literal["float16", "bfloat16"]


@dataclass(frozen=True)
class Rollouts(Part):
    """How many episodes a rollout has, where they begin, and how they are kept.

    Raises:
        ValueError: a value is not among those that its field allows, or `num_starts` comes with prompts in turn.
    """

    samples: int | None = None
    """Images per rollout, of all processes together: a multiple of `env.num_envs` times their number; None: just that.
    Rollouts that an algorithm is given take the place of all its defaults, of `samples` too. (ddpo-pytorch:
    `sample.batch_size` × `sample.num_batches_per_epoch`.)"""

    group_size: int = 1
    """Images of one prompt that are drawn side by side, a divisor of `env.num_envs`; 1: the prompt of each image is
    drawn for itself. Rewards differ more between prompts than among the images of one prompt (three times the variance,
    for kilobytes of the embedded model's images), and with groups a prompt's mean is known from the first rollout on.
    """

    prompt_sampling: PromptSampling = "random"
    """"random": the prompt of each image, or group, is drawn for itself, as the prompt set's weights say.
    "round_robin": all prompts in passes, each once per pass, in an order that is shuffled anew for every pass."""

    same_noise: bool = False
    """Start the images of a group from the same noise, so that they differ by the policy's draws alone."""

    num_starts: int | None = None
    """How many different starts of groups (prompt and noise) there are in the whole run; None: every start is new. With
    `reward="reference_distance"` a start that comes again costs no new reference."""

    async_rewards: bool = False
    """Compute rewards in a thread while the next images of the rollout are drawn, where `samples` is several times
    `env.num_envs`: for rewards that are waited for, another machine's or another device's. The rollout is the same;
    `time/reward_seconds` is then the decoding, and the rest of the rollout's time has what rewards take longer than the
    images behind which they hide. Refused behind wrappers that have a `step`, for these would see no rewards. What ends
    a rollout early waits for the reward that is being computed: a thread cannot be stopped."""

    device: str | None = None
    """The device that keeps a rollout's latents and features, such as "cpu"; None: the policy's."""

    dtype: RolloutDtype | None = None
    """The precision in which these are kept, see `agents.experience.storage.Storage`; None: as they come."""

    micro_batch_size: int | None = None
    """Transitions per forward and backward pass of a process; None: `env.num_envs`. Only memory and speed depend on it;
    with the rollout's own batch size the ratio is exactly 1 before the first update."""

    def __post_init__(self) -> None:
        for name in ("samples", "group_size", "num_starts", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None or name == "group_size":
                object.__setattr__(self, name, checked_integer(name, value, at_least=1))
        choices = {"prompt_sampling": (PromptSampling, self.prompt_sampling), "dtype": (RolloutDtype, self.dtype)}
        for name, (kind, value) in choices.items():
            if value not in get_args(kind) and not (name == "dtype" and value is None):
                raise ValueError(f"{name} must be one of {get_args(kind)}, got {value!r}")
        if self.num_starts is not None and self.prompt_sampling != "random":
            raise ValueError('num_starts draws prompt and noise together: leave prompt_sampling at "random"')
        self.storage()

    def storage(self) -> Storage:
        """Return where, and how precisely, rollouts are kept.

        Raises:
            ValueError: `device` is not the name of a device.
        """
        try:
            device = None if self.device is None else torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f'device must be None or a device such as "cpu", got {self.device!r} ({error})') from error
        return Storage(device, None if self.dtype is None else getattr(torch, self.dtype))


@dataclass(frozen=True, eq=False)
class Rollout:
    """B episodes of at most T steps, each in a lane (a column) of its own.

    What does not change within an episode is stored once per episode, embeddings once per prompt. Where the action is
    the next latents, latents are stored once: observations and actions are two views of one tensor. A rollout that
    keeps "ends" alone has no observations, one step of actions (the ends), and no scored ones.

    Where many processes train together, observations and actions are only those of the episodes that this process drew;
    all else is of all episodes, and indices always count all of them.

    Args:
        changing: [T, B, …] each: the part of the observation that changes within an episode.
        constants: [B, …] each: the rest of the observation, see `Constants`.
        actions: [T, B, …].
        log_probs: [T, B] float32, by the policy that acted; 0 where `scored` is False.
        scored: [T, B] bool on the host: the action was taken within an episode with a valid reward, and has a density.
        lengths: [B] int64 on the host: the episodes' steps.
        returns: [B] float32, the episodes' summed rewards; NaN where they are not valid.
        valid: [B] bool on the host: the episode has a reward. All have one, unless the environment was made with
            on_invalid_reward="nan".
        prompt_id: [B] int64 on the host.
        extras: [B] each: rewards by name, as `info["reward/<name>"]` reports them.
        ends: [B, …] each episode's last action: x_0, where the action is the next latents.
        images: [k, 3, H, W] of the first k episodes.
        first_episode: The index of the first episode whose observations and actions are here.
        are_passes_shared: Every process makes as many passes as any other, see `micro_batches`.
        storage: How the large values among observations, and actions that are latents, are kept.
    """

    changing: Mapping[str, Tensor]
    constants: Mapping[str, Constants]
    actions: Tensor
    log_probs: Tensor
    scored: np.ndarray
    lengths: np.ndarray
    returns: Tensor
    valid: np.ndarray
    prompt_id: np.ndarray
    extras: Mapping[str, Tensor]
    ends: Tensor
    images: Tensor
    first_episode: int = 0
    are_passes_shared: bool = False
    storage: Storage = field(default_factory=Storage)

    @property
    def num_steps(self) -> int:
        """The longest episode's length T."""
        return len(self.log_probs)

    @property
    def num_episodes(self) -> int:
        """The number of episodes B."""
        return len(self.returns)

    @property
    def lanes_here(self) -> slice:
        """The lanes whose observations and actions are in this process."""
        return slice(self.first_episode, self.first_episode + self.actions.shape[1])

    def is_here(self, lanes: np.ndarray) -> np.ndarray:
        """Return whether the observations and actions of lanes are in this process, bool of the same shape."""
        return (lanes >= self.lanes_here.start) & (lanes < self.lanes_here.stop)

    def observation(self, steps: Tensor, lanes: Tensor) -> dict[str, Tensor]:
        """Return what the policy saw in M transitions, [M, …] each, given their indices [M] on the device."""
        columns = lanes - self.first_episode
        changing = {key: self._read(value, steps, columns) for key, value in self.changing.items()}
        return changing | {key: value[columns] for key, value in self.constants.items()}

    def action(self, steps: Tensor, lanes: Tensor) -> Tensor:
        """Return what the policy did in M transitions, [M, …], given their indices [M] on the device."""
        return self._read(self.actions, steps, lanes - self.first_episode)

    def _read(self, values: Tensor, steps: Tensor, columns: Tensor) -> Tensor:
        kept = values[steps.to(values.device), columns.to(values.device)]
        return self.storage.read(kept, self.returns.device)

    def micro_batches(self, steps: np.ndarray, lanes: np.ndarray, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the indices (steps, lanes) of those transitions that are here, on the device, `size` at a time.

        Where passes are shared, empty ones follow until every process has had as many.
        """
        here = self.is_here(lanes)
        index = to_device(np.stack([steps[here], lanes[here]]).astype(np.int64), self.returns.device)
        yield from ((part[0], part[1]) for part in index.split(size, dim=1) if part.shape[1])
        if self.are_passes_shared:
            longest = np.bincount(lanes // self.actions.shape[1], minlength=1).max()
            for _ in range(-(-longest // size) - -(-here.sum() // size)):
                yield index[0, :0], index[1, :0]
