"""Whole episodes of a vector environment, stored time-major, collected through the Gymnasium API alone."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import Tensor

from diffusion_gym.transfer import to_device
from diffusion_gym.transitions import Reduction

from ..policies.base import Generators, Observation, Policy
from .storage import LARGE, Storage

Options = Mapping[str, Any] | None
Keep = Literal["steps", "ends"]

_CHANGING = (*LARGE, "timestep", "next_timestep", "step")


@dataclass(frozen=True, eq=False)
class Constants:
    """What is observed of B episodes and does not change within one; equal rows are kept once.

    Args:
        values: [P, …] the distinct rows: of embeddings, one for each prompt.
        rows: [B] int64 on the same device: which row is each episode's.
    """

    values: Tensor
    rows: Tensor

    def __getitem__(self, episodes: Tensor | slice) -> Tensor:
        """Return the rows of some episodes, [M, …]."""
        return self.values[self.rows[episodes]]

    @classmethod
    def of(cls, values: "Constants | Tensor") -> "Constants":
        """Return plain rows, [B, …], as such ones."""
        return values if isinstance(values, Constants) else cls(values, torch.arange(len(values), device=values.device))

    def part(self, episodes: slice) -> "Constants":
        """Return those of some of the episodes."""
        return Constants(self.values, self.rows[episodes])


@dataclass(frozen=True, eq=False)
class Rollout:
    """B episodes of at most T steps.

    What does not change within an episode is stored once per episode, embeddings once per prompt. Where the action is
    the next latents, latents are stored once: observations and actions are two views of one tensor. A rollout that kept
    its ends alone has no observations, one step of actions (the ends), and no scored ones.

    Where many processes train together, observations and actions are only those of the episodes that this one drew;
    all else is of all, and indices always count all episodes.

    Args:
        changing: [T, B, …] each: the part of the observation that changes within an episode.
        constants: [B, …] each: the rest of it, see `Constants`.
        actions: [T, B, …].
        log_probs: [T, B] float32, by the policy that acted; 0 where `scored` is False.
        scored: [T, B] bool on the host: the action was taken within an episode with a valid reward, and has a density.
        lengths: [B] int64 on the host: the episodes' steps.
        returns: [B] float32, the episodes' summed rewards; NaN where they are not valid.
        valid: [B] bool on the host: the episode has a reward. Others are of environments with on_invalid_reward="nan".
        prompt_id: [B] int64 on the host.
        extras: [B] each: rewards by name, as `info["reward/<name>"]` reports them.
        ends: [B, …] the actions of the last of the T steps. Where the action is the next latents, x_0; where it is not,
            they say nothing of lanes whose episodes had ended before.
        images: [k, 3, H, W] of the first k episodes.
        first: The index of the first episode whose observations and actions are here.
        storage: How the latents and features among the observations, and actions that are latents, are kept.
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
        index = to_device(np.stack([steps[here], lanes[here]]).astype(np.int64), self.returns.device)
        yield from ((part[0], part[1]) for part in index.split(size, dim=1) if part.shape[1])


class _Tape:
    """What a rollout's batches hand in, written in place: tensors [T, B, …], and [B, …] of what is constant.

    Args:
        num_steps: The longest episode's; None: not known, so the tape grows.
        num_episodes: B.
        storage: How large values are kept.
    """

    def __init__(self, num_steps: int | None, num_episodes: int, storage: Storage) -> None:
        self._num_steps, self._num_episodes = num_steps or 0, num_episodes
        self._storage = storage
        self._whole: dict[str, Tensor] = {}
        self._constants: dict[str, list[Tensor]] = {}
        self._rows: dict[str, list[int]] = {}
        self._row_of_prompt: dict[int, int] = {}

    def write(self, key: str, step: int, first: int, values: Tensor) -> None:
        """Write what a batch, whose first episode is `first`, has at a step, [lanes, …]."""
        if key not in self._whole:
            kept = self._storage.kept(values[:0]) if key in LARGE else values
            self._whole[key] = kept.new_zeros(self._num_steps + 1, self._num_episodes, *values.shape[1:])
        while step >= len(self._whole[key]):
            self._whole[key] = torch.cat([self._whole[key], torch.zeros_like(self._whole[key])])
        self._whole[key][step, first : first + len(values)] = values

    def has(self, key: str) -> bool:
        """Return whether anything was written of this kind."""
        return key in self._whole

    def read(self, key: str, num_steps: int) -> Tensor:
        """Return the first steps of what was written."""
        return self._whole[key][:num_steps]

    def begin(self, observation: Observation, prompt_id: np.ndarray) -> None:
        """Take in what a batch observes of its prompts; one outside of the prompt set (−1) always counts as new."""
        rows, new = [], []
        for lane, prompt in enumerate(prompt_id.tolist()):
            row = self._row_of_prompt.get(prompt)
            if row is None:
                row = len(self._row_of_prompt)
                self._row_of_prompt[prompt if prompt >= 0 else -2 - row] = row
                new.append(lane)
            rows.append(row)
        for key in observation.keys() - set(_CHANGING):
            parts, known = self._constants.setdefault(key, []), self._rows.setdefault(key, [])
            if not key.endswith("embeds"):
                parts.append(observation[key])
                known.extend(range(len(known), len(known) + len(rows)))
            elif key.startswith("negative_"):  # the environment has one negative prompt
                parts.extend([] if parts else [observation[key][:1].clone()])
                known.extend([0] * len(rows))
            else:
                parts.append(observation[key][to_device(np.array(new, dtype=np.int64), observation[key].device)])
                known.extend(rows)

    def constants(self) -> dict[str, Constants]:
        """Return what was observed of the prompts."""
        return {
            key: Constants(torch.cat(parts), to_device(np.array(self._rows[key]), parts[0].device))
            for key, parts in self._constants.items()
        }


class _Batch:
    """The episodes of all lanes between two resets, as they come.

    Args:
        first: The index of its first episode in the rollout.
        prompt_id: [num_envs].
        num_images: How many of its images are wanted.
        device: Where rewards are.
    """

    def __init__(self, first: int, prompt_id: np.ndarray, num_images: int, device: torch.device) -> None:
        self.first, self.prompt_id, self.num_images = first, prompt_id, num_images
        self.returns = torch.zeros(len(prompt_id), device=device, dtype=torch.float32)
        self.valid = np.ones(len(prompt_id), dtype=bool)
        self.active: list[np.ndarray] = []
        self.scored: list[np.ndarray] = []
        self.finals: dict[str, Tensor] = {}
        self.pending: list[tuple[np.ndarray, Future[tuple[Tensor, dict[str, Any]]]]] = []

    def finish(self, ended: np.ndarray, info: Mapping[str, Any]) -> None:
        """Keep what the last step's info says of the lanes that it ended."""
        for key, values in info.items():
            if key == "images" or key.startswith("reward/"):
                wanted = self.num_images if key == "images" else len(ended)
                mask = torch.from_numpy(ended[:wanted]).to(values.device).reshape(-1, *[1] * (values.ndim - 1))
                known = self.finals.get(key)
                kept = values[:wanted]
                self.finals[key] = kept.clone() if known is None else torch.where(mask, kept, known)
        if "reward_invalid" in info:
            self.valid &= ~(ended & info["reward_invalid"])
        if "pending_rewards" in info:
            self.pending.append((ended, info["pending_rewards"]))

    def wait(self) -> None:
        """Wait for the rewards that are still computed."""
        for ended, future in self.pending:
            rewards, named = future.result()
            self.returns += rewards
            self.finish(ended, named)
        self.pending = []


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
    keep: Keep = "steps",
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
        keep: "steps": all that is needed to score the actions again; "ends": the last actions (x_0, where the action is
            the next latents) alone, for which nothing is scored.

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
    collector = _Collector(env, policy, len(seeds), storage, keep, deterministic, reduction, after_step)
    deferred = env.unwrapped.deferred_rewards() if async_rewards else contextlib.nullcontext()  # type: ignore[attr-defined]
    with deferred:
        for seed, reset_options, draws in zip(seeds, each, drawn_from, strict=True):
            if not collector.run(*env.reset(seed=seed, options=reset_options), draws, max_images):  # type: ignore[arg-type]
                return None
        for batch in collector.batches:
            batch.wait()
    return collector.rollout(max_images)


def _longest(env: VectorEnv) -> int | None:
    """Return how many steps an episode has at most; None: not known."""
    steps = (getattr(env.unwrapped, name, None) for name in ("num_steps", "max_steps"))
    return next((number for number in steps if number is not None), None)


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
    policy.check_prompts(env.single_observation_space, env.unwrapped.prompts, env.unwrapped.negative_prompt)  # type: ignore[attr-defined]
    here, there = policy.device, env.unwrapped.device  # type: ignore[attr-defined]
    if here.type != there.type or (here.index or 0) != (there.index or 0):
        raise ValueError(f"the policy is on {here}, the environment on {there}: make both with the same device")


def _check_async(env: VectorEnv, async_rewards: bool) -> None:
    while async_rewards and env is not env.unwrapped:
        if type(env).step is not VectorWrapper.step:
            raise ValueError(f"async_rewards comes too late for {type(env).__name__}, which sees each step's rewards")
        env = env.env  # type: ignore[attr-defined]


class _Collector:
    """Runs the batches of a rollout, one after the other; the arguments are those of `collect`."""

    def __init__(
        self,
        env: VectorEnv,
        policy: Policy,
        num_batches: int,
        storage: Storage,
        keep: Keep,
        deterministic: bool,
        reduction: Reduction,
        after_step: Callable[[int], bool] | None,
    ) -> None:
        self.env, self.policy, self.storage, self.keep = env, policy, storage, keep
        self.deterministic, self.reduction, self.after_step = deterministic, reduction, after_step
        self.stores_latents_once = bool(env.metadata.get("action_is_next_latents", False))
        self.batches: list[_Batch] = []
        self.tape = _Tape(_longest(env) if keep == "steps" else 0, num_batches * env.num_envs, storage)

    def run(
        self, observation: Observation, info: Mapping[str, Any], generators: Generators | None, max_images: int
    ) -> bool:
        """Run the episodes that a reset began to their ends; return whether nobody stopped them."""
        env, mode = self.env, self.env.metadata["autoreset_mode"]
        first = len(self.batches) * env.num_envs
        num_images = min(max(0, max_images - first), env.num_envs)
        batch = _Batch(first, info["prompt_id"], num_images, env.unwrapped.device)  # type: ignore[attr-defined]
        self.batches.append(batch)
        observation = self.storage.seen(observation)
        self.tape.begin(observation, batch.prompt_id)
        if self.keep == "steps" and self.stores_latents_once:
            self.tape.write("latents", 0, first, observation["latents"])
        active = np.ones(env.num_envs, dtype=bool)
        while active.any():
            scored = self.policy.scored(info) if self.keep == "steps" else np.zeros_like(active)
            batch.scored.append(active if scored is None else scored & active)
            batch.active.append(active)
            action = self._act(batch, observation, generators)
            following, reward, _, _, info = env.step(action)
            observation = self.storage.seen(following)
            batch.returns += reward
            ended = info["ended"] & active
            if ended.any():
                batch.finish(ended, info["final_info"] if mode is AutoresetMode.SAME_STEP else info)
            active = active & ~ended
            if ended.any() and active.any() and mode is not AutoresetMode.DISABLED:
                raise ValueError(
                    "the lanes' episodes differ in length, and lanes that reset themselves would favour the short "
                    'ones: make the environment with autoreset_mode="DISABLED"'
                )
            if self.after_step is not None and not self.after_step(int(batch.active[-1].sum())):
                return False
        if self.keep == "ends":
            self.tape.write("latents" if self.stores_latents_once else "actions", 0, first, action)
        return True

    def _act(self, batch: _Batch, observation: Observation, generators: Generators | None) -> Tensor:
        """Return the actions, and write them down with what led to them."""
        how = {
            "generators": generators,
            "deterministic": self.deterministic,
            "precision": self.storage.dtype if self.stores_latents_once else None,
        }
        step, first = len(batch.scored) - 1, batch.first
        if not batch.scored[-1].any():
            action = self.policy.act(observation, **how)  # type: ignore[arg-type]
        else:
            action, log_prob = self.policy.sample(observation, reduction=self.reduction, **how)  # type: ignore[arg-type]
            self.tape.write("log_probs", step, first, log_prob)
        if self.keep == "steps":
            for key in _CHANGING:
                if key in observation and not (self.stores_latents_once and key == "latents"):
                    self.tape.write(key, step, first, observation[key])
            if self.stores_latents_once:
                self.tape.write("latents", step + 1, first, action)
            else:
                self.tape.write("actions", step, first, action)
        return action

    def rollout(self, max_images: int) -> Rollout:
        """Return all batches side by side, time-major; shorter ones are filled up with zeros that nobody looks at."""
        batches = self.batches
        longest = max(len(batch.active) for batch in batches)
        valid = np.concatenate([batch.valid for batch in batches])
        returns = torch.cat([batch.returns for batch in batches])

        def on_the_host(name: str) -> np.ndarray:
            columns = [np.stack(getattr(batch, name)) for batch in batches]
            return np.concatenate([np.pad(column, ((0, longest - len(column)), (0, 0))) for column in columns], axis=1)

        scored = on_the_host("scored") & valid
        changing = {key: self.tape.read(key, longest) for key in _CHANGING if self.tape.has(key)}
        if not self.stores_latents_once:
            actions = self.tape.read("actions", longest)
        elif self.keep == "ends":
            actions = changing.pop("latents")
        else:
            latents = self.tape.read("latents", longest + 1)
            changing["latents"], actions = latents[:-1], latents[1:]
        log_probs = returns.new_zeros(scored.shape)
        if self.tape.has("log_probs"):
            log_probs = self.tape.read("log_probs", longest).masked_fill(~to_device(scored, returns.device), 0.0)
        return Rollout(
            changing=changing,
            constants=self.tape.constants(),
            actions=actions,
            log_probs=log_probs,
            scored=scored,
            lengths=on_the_host("active").sum(0),
            returns=returns,
            valid=valid,
            prompt_id=np.concatenate([batch.prompt_id for batch in batches]),
            extras={
                key: torch.cat([batch.finals[key] for batch in batches]) for key in batches[0].finals if key != "images"
            },
            ends=self.storage.read(actions[-1], returns.device),
            images=torch.cat([batch.finals["images"] for batch in batches])[:max_images],
            storage=self.storage,
        )
