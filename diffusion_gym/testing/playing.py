"""Playing a vector environment with reproducible random actions, with a check of every step."""

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Dict, Space, Tuple
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array
from torch import Tensor

from ..envs.contract import TorchVectorEnv
from . import torch_contract
from .data import Row, check_batch, copied, difference, is_array, leaves, on_host, overlap, row_of, row_of_one
from .memory import Memory
from .report import fault

Start = tuple[Any, dict[str, Any]]


@dataclass
class Episode:
    """What one lane saw and earned in one episode, on the host.

    Args:
        lane: The lane.
        rows: [T + 1] its observations, from the first to the last one.
        rewards: [T] its rewards.
        calls: [T] the calls of `step`, counted from the run's reset, from 1.
        flags: Whether the episode was terminated, and whether truncated.
        info: The info of the last step, in SAME_STEP the final info; of all lanes.
    """

    lane: int
    rows: list[Row]
    rewards: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    flags: tuple[bool, bool] = (False, False)
    info: Mapping[str, Any] = field(default_factory=dict)


def unlike(got: Episode, expected: Episode, what: str, *, tolerance: float = 0.0) -> AssertionError | None:
    """Return the error that says where two episodes differ first; None where they do not.

    Args:
        got: An episode.
        expected: Another, of the same actions.
        what: What was expected of the two.
        tolerance: The relative and absolute difference that numbers may have.
    """
    for index in range(min(len(got.rows), len(expected.rows))):
        call = got.calls[index - 1] if index else got.calls[0] - 1
        found = difference(got.rows[index], expected.rows[index], tolerance=tolerance)
        if found:
            return fault(f"{what}: {found[1]}", step=call, lane=got.lane, key=found[0])
        if index:
            reward, other = got.rewards[index - 1], expected.rewards[index - 1]
            if not np.isclose(reward, other, rtol=tolerance, atol=tolerance, equal_nan=True):
                return fault(f"{what}: got {reward}, expected {other}", step=call, lane=got.lane, key="reward")
    if len(got.rewards) != len(expected.rewards):
        took = f"{what}: the episode took {len(got.rewards)} steps, expected {len(expected.rewards)}"
        return fault(took, step=got.calls[-1], lane=got.lane)
    if got.flags != expected.flags:
        ends = f"{what}: (terminated, truncated) is {got.flags}, expected {expected.flags}"
        return fault(ends, step=got.calls[-1], lane=got.lane)
    return None


class Player:
    """Plays a vector environment, and checks what every reset and step returns.

    Args:
        env: The environment.
        max_steps: The steps within which an episode must end.

    Attributes:
        like: A tensor like those of the environment; None: its data are arrays.
        contract: The environment below its wrappers, where it is a `TorchVectorEnv`.
        pays_integers: A reward was of integers.
    """

    def __init__(self, env: VectorEnv, *, max_steps: int) -> None:
        self.env = env
        self.mode: AutoresetMode = env.metadata["autoreset_mode"]
        self.space, self.num_envs = env.single_observation_space, env.num_envs
        bare = env.unwrapped
        self._max_steps = max_steps
        self._action_space = copy.deepcopy(env.single_action_space)
        self.like: Tensor | None = None
        self.pays_integers = False
        self._reset_info: Mapping[str, Any] = {}
        self.contract: TorchVectorEnv | None = None
        first = next((leaf for _, _, leaf in leaves(self.space, env.reset()[0]) if is_array(leaf)), None)
        if isinstance(first, Tensor):
            self.like = first
            self.contract = bare if isinstance(bare, TorchVectorEnv) else None
        self._memory = Memory(self._constant_keys())

    def play(
        self,
        start: Start,
        *,
        num_episodes: int = 2,
        first_episode: int = 0,
        varied_lanes: tuple[int, ...] = (),
        vary_ignored: bool = False,
        disturb: bool = False,
    ) -> list[list[Episode]]:
        """Return each lane's first episodes from `start`, what a reset has just returned.

        An action depends on the lane, its episode and its step alone, whatever the other lanes do.

        Args:
            start: What a reset has just returned.
            num_episodes: The episodes of each lane, at least.
            first_episode: The number of the first episode, for the actions.
            varied_lanes: The lanes that are given other actions.
            vary_ignored: Give other actions in NEXT_STEP's steps that reset.
            disturb: Draw from the global generators before every step.
        """
        self._memory = Memory(self._constant_keys())
        self.check_start(start)
        before, call = start[0], 0
        played: list[list[Episode]] = [[] for _ in range(self.num_envs)]
        running = [Episode(lane, [row_of(self.space, before, lane)]) for lane in range(self.num_envs)]
        resetting = np.zeros(self.num_envs, dtype=bool)
        while any(len(episodes) < num_episodes for episodes in played):
            call += 1
            places = [
                (
                    lane,
                    first_episode + len(played[lane]),
                    len(running[lane].rewards),
                    (lane in varied_lanes) + 2 * (vary_ignored and bool(resetting[lane])),
                )
                for lane in range(self.num_envs)
            ]
            if max(step for _, _, step, _ in places) >= self._max_steps:
                raise fault(f"no episode ended within {self._max_steps} steps: see max_steps", step=call)
            if disturb:
                random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
            after, ended = self._advance(self.actions(places), running, resetting, call)
            if self.mode is AutoresetMode.DISABLED and ended.any():
                after = self._masked_reset(after, ended, call)
            for lane in np.flatnonzero(ended | resetting).tolist():
                if ended[lane]:
                    played[lane].append(running[lane])
                running[lane] = Episode(lane, [row_of(self.space, after, lane)])
            resetting = ended & (self.mode is AutoresetMode.NEXT_STEP)
        return played

    def _advance(self, action: Any, running: list[Episode], resetting: np.ndarray, call: int) -> tuple[Any, np.ndarray]:
        """Take a step, add it to the episodes that are running, and return its observation and the lanes that ended."""
        after, reward, ended, flags, info = self._step(action, call)
        finals, rewards = self._finals(after, ended, info, call), on_host(reward)
        for lane, episode in enumerate(running):
            if resetting[lane]:
                self._check_resetting(rewards[lane], ended[lane], call, lane)
                continue
            seen = finals[lane] if lane in finals else row_of(self.space, after, lane)
            if self.contract is not None:
                torch_contract.check_moved(self.env, episode.rows[-1], seen, action, step=call, lane=lane)
            episode.rows.append(seen)
            episode.rewards.append(float(rewards[lane]))
            episode.calls.append(call)
            episode.flags = bool(flags[0][lane]), bool(flags[1][lane])
            episode.info = info.get("final_info", info) if ended[lane] else {}
        return after, ended

    def check_start(self, start: object) -> None:
        """Check what a reset has returned.

        Raises:
            AssertionError: it is not as the spaces say.
        """
        if not isinstance(start, tuple) or len(start) != 2 or not isinstance(start[1], dict):
            raise fault(f"must return (observation, info dict), got {start!r:.80}", step=0)
        self._reset_info = start[1]
        check_batch(self.space, start[0], self.num_envs, step=0)
        _check_masks(start[1], self.num_envs, 0)
        self._memory.keep(self._arrays_of(start[0]), start[1], step=0)

    def _arrays_of(self, observation: Any) -> dict[str, Any]:
        return {name: leaf for name, _, leaf in leaves(self.space, observation) if is_array(leaf)}

    def _constant_keys(self) -> frozenset[str]:
        """Return the names of the leaves that may share memory, being constant within an episode."""
        keys = self.contract.constant_keys if self.contract is not None else ()
        return frozenset(f"observation[{key!r}]" for key in keys)

    def actions(self, places: list[tuple[int, int, int, int]]) -> Any:
        """Return a batch of random actions, for each lane that of its (lane, episode, step, variant)."""
        empty: Any = create_empty_array(self._action_space, self.num_envs)
        batch = concatenate(self._action_space, [self.action(place) for place in places], empty)
        return self._as_actions(self._action_space, batch)

    def action(self, place: tuple[int, int, int, int]) -> Any:
        """Return the random action of a (lane, episode, step, variant), of the space of one lane."""
        self._action_space.seed(int(np.random.SeedSequence(place).generate_state(1)[0]) % 2**31)
        return self._action_space.sample()

    def _as_actions(self, space: Space, batch: Any) -> Any:
        """Return NumPy actions, as tensors where the environment's data are."""
        if isinstance(space, Dict):
            return {key: self._as_actions(space[key], value) for key, value in batch.items()}
        if isinstance(space, Tuple):
            return tuple(map(self._as_actions, space, batch))
        if self.like is None or not isinstance(batch, np.ndarray):
            return batch
        actions = torch.from_numpy(batch).to(self.like.device)
        dtype = self.contract.dtype if self.contract is not None else self.like.dtype
        return actions.to(dtype) if actions.is_floating_point() and dtype.is_floating_point else actions

    def _step(self, action: Any, call: int) -> tuple[Any, Any, np.ndarray, tuple[np.ndarray, np.ndarray], Any]:
        """Return the observation, reward, mask of lanes that ended, flags and info of a step, checked."""
        given = {name: (leaf, copied(leaf)) for name, _, leaf in leaves(self._action_space, action, "action")}
        result = self.env.step(action)
        if not isinstance(result, tuple) or len(result) != 5:
            raise fault("must return (observation, reward, terminated, truncated, info)", step=call)
        after, reward, terminated, truncated, info = result
        check_batch(self.space, after, self.num_envs, step=call)
        self._check_vector("reward", reward, call)
        flags = {"terminated": terminated, "truncated": truncated}
        for name, flag in flags.items():
            self._check_vector(name, flag, call)
        if not isinstance(info, dict):
            raise fault(f"must be a dict, got {type(info).__name__}", step=call, key="info")
        _check_masks(info, self.num_envs, call)
        ended = on_host(terminated) | on_host(truncated)
        for name, (leaf, before) in given.items():
            if is_array(leaf) and not np.array_equal(on_host(leaf), before):
                raise fault("step must not change the caller's action", step=call, key=name)
            for observed, _, value in leaves(self.space, after):
                if is_array(leaf) and is_array(value) and overlap(leaf, value):
                    raise fault("shares memory with the caller's action: return a copy", step=call, key=observed)
        self._memory.check()
        self._memory.keep(self._arrays_of(after) | {"reward": reward, **flags}, info, step=call)
        if self.contract is not None:
            torch_contract.check_step(reward, ended, info, step=call)
        return after, reward, ended, (on_host(terminated), on_host(truncated)), info

    def _check_vector(self, name: str, values: Any, call: int) -> None:
        """Check the reward or a flag: one finite number or truth for each lane, of the observations' kind."""
        kind = np.ndarray if self.like is None else Tensor
        if not isinstance(values, kind):
            said = "a numpy array" if self.like is None else "a torch tensor"
            raise fault(f"must be {said} as the observations are, got {type(values).__name__}", step=call, key=name)
        if tuple(values.shape) != (self.num_envs,):
            raise fault(f"has shape {tuple(values.shape)}, expected {(self.num_envs,)}", step=call, key=name)
        if isinstance(values, Tensor) and values.requires_grad:
            raise fault("carries a gradient: return it detached", step=call, key=name)
        if self.like is not None and values.device != self.like.device:
            raise fault(f"is on {values.device}, the observations on {self.like.device}", step=call, key=name)
        host = on_host(values)
        if name == "reward":
            if host.dtype.kind not in "fiu":
                raise fault(f"must be of floating-point numbers, got {values.dtype}", step=call, key=name)
            self.pays_integers |= host.dtype.kind != "f"
            bad = ~np.isfinite(host)
            if bad.any():
                lane = int(np.flatnonzero(bad)[0])
                raise fault(f"must be finite, got {host[lane]}", step=call, lane=lane, key=name)
        elif host.dtype != np.bool_:
            raise fault(f"must be bool, got {values.dtype}", step=call, key=name)

    def _finals(self, after: Any, ended: np.ndarray, info: Mapping[str, Any], call: int) -> dict[int, Row]:
        """Return SAME_STEP's last observations of the lanes that ended, after a check of what the mode promises."""
        if self.mode is not AutoresetMode.SAME_STEP:
            if "final_obs" in info:
                raise fault(f"{self.mode.name} has no final_obs", step=call, key="info['final_obs']")
            return {}
        if not ended.any():
            mask = on_host(info["_final_obs"]) if "_final_obs" in info else ended
            if np.any(mask):
                raise fault("no lane ended, but the mask says so", step=call, key="info['_final_obs']")
            return {}
        for key in ("final_obs", "final_info"):
            name = f"info[{key!r}]"
            if key not in info or f"_{key}" not in info:
                what = f"SAME_STEP must give it and its mask where a lane ends; info has {sorted(info)}"
                raise fault(what, step=call, key=name)
            mask = on_host(info[f"_{key}"])
            if not np.array_equal(mask, ended):
                expected = f"mask is {mask.tolist()}, the lanes that ended are {ended.tolist()}"
                raise fault(expected, step=call, key=name)
        final, lanes = info["final_obs"], np.flatnonzero(ended).tolist()
        name = "info['final_obs']"
        if isinstance(final, np.ndarray) and final.dtype == object:  # Gymnasium's own: one observation for each lane
            for lane in lanes:
                if not self.space.contains(final[lane]):
                    raise fault(f"{final[lane]!r:.80} is outside the space", step=call, lane=lane, key=name)
            finals = {lane: row_of_one(self.space, final[lane]) for lane in lanes}
        else:
            check_batch(self.space, final, self.num_envs, step=call, name=name)
            finals = {lane: row_of(self.space, final, lane) for lane in lanes}
        if self.contract is not None:
            torch_contract.check_final_info(info["final_info"], self._reset_info, step=call)
        return finals

    def _check_resetting(self, reward: float, ended: bool, call: int, lane: int) -> None:
        if reward != 0:
            raise fault(f"NEXT_STEP's step that resets must give 0, got {reward}", step=call, lane=lane, key="reward")
        if ended:
            raise fault("NEXT_STEP's step that resets must not end an episode", step=call, lane=lane)

    def _masked_reset(self, before: Any, mask: np.ndarray, call: int) -> Any:
        """Return the observation of a reset of the lanes that ended, which leaves the others as they are."""
        start = self.env.reset(options={"reset_mask": mask.copy()})
        self.check_start(start)
        for lane in np.flatnonzero(~mask).tolist():
            found = difference(row_of(self.space, start[0], lane), row_of(self.space, before, lane))
            if found:
                what = f"a reset of lanes {np.flatnonzero(mask).tolist()} must leave the others: {found[1]}"
                raise fault(what, step=call, lane=lane, key=found[0])
        return start[0]


def _check_masks(info: Mapping[str, Any], num_envs: int, call: int, name: str = "info") -> None:
    """Check that the masks of an info dict, `_key` beside `key`, are bool, one for each lane, and stand by an entry."""
    for key, value in info.items():
        label = f"{name}[{key!r}]"
        if isinstance(value, Mapping):
            _check_masks(value, num_envs, call, label)
        if not isinstance(key, str) or not key.startswith("_"):
            continue
        if key[1:] not in info:
            raise fault(f"is a mask without an entry {key[1:]!r}", step=call, key=label)
        if not is_array(value) or tuple(value.shape) != (num_envs,) or on_host(value).dtype != np.bool_:
            got = f"{value.dtype} {tuple(value.shape)}" if is_array(value) else type(value).__name__
            raise fault(f"a mask must be bool of shape {(num_envs,)}, got {got}", step=call, key=label)
        entry = info[key[1:]]
        if is_array(entry) and (not entry.shape or len(entry) != num_envs):
            what = f"has shape {tuple(entry.shape)}, expected {num_envs} lanes"
            raise fault(what, step=call, key=f"{name}[{key[1:]!r}]")
