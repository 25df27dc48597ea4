"""Whole episodes of a vector environment, stored time-major, collected through the Gymnasium API alone."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import Tensor

from diffusion_gym.transitions import Reduction

from .policies.base import Generators, Observation, Policy
from .storage import LARGE, Storage

Options = Mapping[str, Any] | None

_CHANGING = (*LARGE, "timestep", "next_timestep", "step")


@dataclass(frozen=True, eq=False)
class Rollout:
    """B episodes of at most T steps.

    What does not change within an episode (the prompt, its embeddings) is stored once per episode. Where the action is
    the next latents, latents are stored once: observations and actions are two views of one tensor.

    Where many processes train together, observations and actions are only those of the episodes that this one drew;
    all else is of all, and indices always count all episodes.

    Args:
        changing: [T, B, …] each: the part of the observation that changes within an episode.
        constants: [B, …] each: the rest of it.
        actions: [T, B, …].
        log_probs: [T, B] float32, by the policy that acted; 0 where `scored` is False.
        scored: [T, B] bool on the host: the action was taken within the episode, and has a density.
        lengths: [B] int64 on the host: the episodes' steps.
        returns: [B] float32, the episodes' summed rewards.
        prompt_id: [B] int64 on the host.
        extras: [B] each: rewards by name, as `info["reward/<name>"]` reports them.
        ends: [B, …] the actions of the last of the T steps. Where the action is the next latents, x_0; where it is not,
            they say nothing of lanes whose episodes had ended before.
        images: [k, 3, H, W] of the first k episodes.
        first: The index of the first episode whose observations and actions are here.
        storage: How the latents and features among the observations, and actions that are latents, are kept.
    """

    changing: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    actions: Tensor
    log_probs: Tensor
    scored: np.ndarray
    lengths: np.ndarray
    returns: Tensor
    prompt_id: np.ndarray
    extras: Mapping[str, Tensor]
    ends: Tensor
    images: Tensor
    first: int = 0
    storage: Storage = field(default_factory=Storage)

    @property
    def num_steps(self) -> int:
        """The longest episode's length T."""
        return len(self.log_probs)

    @property
    def num_episodes(self) -> int:
        """The number of episodes B."""
        return len(self.returns)

    def own(self, lanes: np.ndarray) -> np.ndarray:
        """Return which of the episodes have their observations and actions here, bool of the same shape."""
        return (lanes >= self.first) & (lanes < self.first + self.actions.shape[1])

    def observation(self, steps: Tensor, lanes: Tensor) -> dict[str, Tensor]:
        """Return what the policy saw in M transitions, [M, …] each, given their indices on the device."""
        lanes = lanes - self.first
        changing = {key: self._read(value, steps, lanes) for key, value in self.changing.items()}
        return changing | {key: value[lanes] for key, value in self.constants.items()}

    def action(self, steps: Tensor, lanes: Tensor) -> Tensor:
        """Return what it did in them, [M, …]."""
        return self._read(self.actions, steps, lanes - self.first)

    def _read(self, values: Tensor, *index: Tensor) -> Tensor:
        return self.storage.read(values[tuple(part.to(values.device) for part in index)], self.returns.device)

    def micro_batches(self, steps: np.ndarray, lanes: np.ndarray, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the indices (steps, lanes) of those transitions that are here, on the device, `size` at a time."""
        here = self.own(lanes)
        steps, lanes = steps[here], lanes[here]
        for start in range(0, len(steps), size):
            part = slice(start, start + size)
            yield tuple(torch.from_numpy(index[part]).to(self.returns.device) for index in (steps, lanes))  # type: ignore[misc]


@dataclass
class _Batch:
    """The episodes of all lanes between two resets, as they come."""

    first: Observation
    prompt_id: np.ndarray
    observed: tuple[str, ...]
    changing: list[Observation] = field(default_factory=list)
    actions: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    active: list[np.ndarray] = field(default_factory=list)
    scored: list[np.ndarray] = field(default_factory=list)
    rewards: list[Tensor] = field(default_factory=list)
    finals: dict[str, Tensor] = field(default_factory=dict)
    pending: list[tuple[int, np.ndarray, Future[tuple[Tensor, dict[str, Any]]]]] = field(default_factory=list)

    def finish(self, ended: np.ndarray, info: Mapping[str, Any]) -> None:
        """Keep what the last step's info says of the lanes that it ended."""
        for key, values in info.items():
            if key == "images" or key.startswith("reward/"):
                mask = torch.from_numpy(ended).to(values.device).reshape(-1, *[1] * (values.ndim - 1))
                known = self.finals.get(key)
                self.finals[key] = values if known is None else torch.where(mask, values, known)
        if "pending_rewards" in info:
            self.pending.append((len(self.rewards) - 1, ended, info["pending_rewards"]))

    def wait(self) -> None:
        """Wait for the rewards that are still computed."""
        for step, ended, future in self.pending:
            rewards, named = future.result()
            self.rewards[step] = self.rewards[step] + rewards
            self.finish(ended, named)


@torch.no_grad()
def collect(
    env: VectorEnv,
    policy: Policy,
    *,
    seeds: Sequence[int | Sequence[int] | None] = (None,),
    options: Options | Sequence[Options] = None,
    generators: torch.Generator | Sequence[Generators] | None = None,
    deterministic: bool = False,
    reduction: Reduction = "mean",
    after_step: Callable[[int], bool] | None = None,
    max_images: int = 16,
    storage: Storage | None = None,
    async_rewards: bool = False,
) -> Rollout | None:
    """Return one episode of every lane for each seed.

    All lanes are launched together and run to the end of their episodes, however long these are: "the first so many
    that end" would be the short ones.

    Args:
        env: A torch vector environment of this package. Where episodes differ in length it needs autoreset_mode
            DISABLED: their lanes rest until all are through.
        policy: What acts.
        seeds: What each reset is given.
        options: What every reset is given, or one for each.
        generators: Where the policy's draws come from: one for all, or for each reset one, or one per lane; None: the
            policy's own.
        deterministic: Take the policy's mode instead of draws.
        reduction: How the log-probs that are stored are reduced.
        after_step: Called after each step of the environment with the number of lanes that took it; False stops the
            collection.
        max_images: How many images to keep.
        storage: How latents and features are kept; None: as they come.
        async_rewards: Compute the rewards of what one seed gave in a thread while the next one's is drawn.

    Returns:
        The rollout; None if `after_step` stopped it.

    Raises:
        ValueError: the environment is of another kind, or its lanes end apart from each other and reset themselves, or
            its latents are of low precision themselves and `storage` names another, or a device that is not there.
    """
    if not env.metadata.get("torch"):
        raise ValueError(f"{env} is not a torch vector environment of diffusion_gym, such as DenoisingMDP-v0")
    storage = storage or Storage()
    storage.check(env)
    check_fit(env, policy)
    _check_async(env, async_rewards)
    each = [options] * len(seeds) if options is None or isinstance(options, Mapping) else options
    drawn_from = generators if isinstance(generators, Sequence) else [generators] * len(seeds)
    batches = []
    deferred = env.unwrapped.deferred_rewards() if async_rewards else contextlib.nullcontext()  # type: ignore[attr-defined]
    with deferred:
        for seed, reset_options, draws in zip(seeds, each, drawn_from, strict=True):
            observation, info = env.reset(seed=seed, options=reset_options)  # type: ignore[arg-type]
            batch = _run(env, policy, observation, info, draws, deterministic, reduction, after_step, storage)
            if batch is None:
                return None
            batches.append(batch)
        for batch in batches:
            batch.wait()
    return _assemble(batches, max_images, storage)


def require_torch_env(env: object) -> None:
    """Raise TypeError for what is no torch vector environment."""
    if not isinstance(env, VectorEnv) or not env.metadata.get("torch"):
        raise TypeError(f"env must be a torch vector environment: gym.make_vec(id, num_envs=…); got {env}")


def check_fit(env: VectorEnv, policy: Policy) -> None:
    """Raise ValueError if a policy cannot act in an environment."""
    expected, given = (getattr(one, "max_steps", None) for one in (env.unwrapped, policy))
    if None not in (expected, given) and expected != given:
        raise ValueError(
            f"the policy's steps are those of episodes of at most {given} steps, the env's have {expected}"
        )
    policy.check_fit(env.single_observation_space, env.single_action_space)


def _check_async(env: VectorEnv, async_rewards: bool) -> None:
    while async_rewards and env is not env.unwrapped:
        if type(env).step is not VectorWrapper.step:
            raise ValueError(f"async_rewards comes too late for {type(env).__name__}, which sees each step's rewards")
        env = env.env  # type: ignore[attr-defined]


def _run(
    env: VectorEnv,
    policy: Policy,
    observation: Observation,
    info: Mapping[str, Any],
    generators: Generators | None,
    deterministic: bool,
    reduction: Reduction,
    after_step: Callable[[int], bool] | None,
    storage: Storage,
) -> _Batch | None:
    mode = env.metadata["autoreset_mode"]
    stored_once = env.metadata.get("action_is_next_latents", False)
    precision = storage.dtype if stored_once else None
    observation = storage.seen(observation)
    observed = tuple(key for key in _CHANGING if key in observation and not (stored_once and key == "latents"))
    batch = _Batch(observation, info["prompt_id"], observed)
    active = np.ones(env.num_envs, dtype=bool)
    while active.any():
        scored = policy.scored(info)
        batch.active.append(active)
        batch.scored.append(active if scored is None else scored & active)
        if batch.scored[-1].any():
            action, log_prob = policy.sample(
                observation,
                generators=generators,
                deterministic=deterministic,
                reduction=reduction,
                precision=precision,
            )
        else:
            action = policy.act(observation, generators=generators, deterministic=deterministic, precision=precision)
            log_prob = torch.zeros(env.num_envs, device=action.device)
        batch.changing.append(
            {key: storage.kept(observation[key]) if key in LARGE else observation[key] for key in batch.observed}
        )
        batch.actions.append(storage.kept(action) if stored_once else action)
        batch.log_probs.append(log_prob)
        following, reward, _, _, info = env.step(action)
        observation = storage.seen(following)
        batch.rewards.append(reward)
        ended = info["ended"] & active
        if ended.any():
            batch.finish(ended, info["final_info"] if mode is AutoresetMode.SAME_STEP else info)
        active = active & ~ended
        if ended.any() and active.any() and mode is not AutoresetMode.DISABLED:
            raise ValueError(
                "the lanes' episodes differ in length, and lanes that reset themselves would favour the short ones: "
                'make the environment with autoreset_mode="DISABLED"'
            )
        if after_step is not None and not after_step(int(batch.active[-1].sum())):
            return None
    return batch


def _assemble(batches: Sequence[_Batch], max_images: int, storage: Storage) -> Rollout:
    """Put the batches side by side, time-major; shorter ones are filled up with zeros that nobody looks at.

    What the batches hold is taken from them key by key, so that large features are never there three times.
    """
    longest = max(len(batch.actions) for batch in batches)

    def side_by_side(name: str, key: str | None = None) -> Tensor:
        rows = [[row if key is None else row.pop(key) for row in getattr(batch, name)] for batch in batches]
        whole = rows[0][0].new_zeros(longest, sum(len(column[0]) for column in rows), *rows[0][0].shape[1:])
        first_lane = 0
        for column in rows:
            for step, row in enumerate(column):
                whole[step, first_lane : first_lane + len(row)] = row
            first_lane += len(column[0])
        return whole

    def on_the_host(name: str) -> np.ndarray:
        columns = [np.stack(getattr(batch, name)) for batch in batches]
        return np.concatenate([np.pad(column, ((0, longest - len(column)), (0, 0))) for column in columns], axis=1)

    first = batches[0]
    scored = on_the_host("scored")
    actions = side_by_side("actions")
    changing = {key: side_by_side("changing", key) for key in first.observed}
    if "latents" not in changing:
        starts = torch.cat([storage.kept(batch.first["latents"]) for batch in batches])
        latents = torch.cat([starts[None], actions])
        changing["latents"], actions = latents[:-1], latents[1:]
    log_probs = side_by_side("log_probs")
    weights = torch.from_numpy(scored).to(log_probs.device)
    return Rollout(
        changing=changing,
        constants={
            key: torch.cat([batch.first[key] for batch in batches]) for key in first.first if key not in _CHANGING
        },
        actions=actions,
        log_probs=log_probs.masked_fill(~weights, 0.0),
        scored=scored,
        lengths=on_the_host("active").sum(0),
        returns=side_by_side("rewards").sum(0),
        prompt_id=np.concatenate([batch.prompt_id for batch in batches]),
        extras={key: torch.cat([batch.finals[key] for batch in batches]) for key in first.finals if key != "images"},
        ends=storage.read(actions[-1], log_probs.device),
        images=torch.cat([batch.finals["images"][:max_images] for batch in batches])[:max_images],
        storage=storage,
    )
