"""Writing a rollout down while it happens."""

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, final

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from diffusion_gym.envs.contract import TorchVectorEnv
from diffusion_gym.transfer import to_device

from ..policies.base import Observation
from .constants import DistinctRows
from .rollouts import Keep, Rollout
from .storage import Storage

Rewards = tuple[Tensor, Mapping[str, Any]]
"""Rewards of all lanes, [num_envs], and what else is known of them, by its name in `info`."""


@final
class Tape:
    """One kind of value of every step and episode, [T, B, …], written in place.

    Args:
        example: [0, …] a value of no episode, whose shape, dtype and device all have.
        num_steps: T; more are added where more are written.
        num_episodes: B.
    """

    def __init__(self, example: Tensor, num_steps: int, num_episodes: int) -> None:
        self._values = example.new_zeros(num_steps, num_episodes, *example.shape[1:])

    def write(self, step: int, lanes: slice, values: Tensor) -> None:
        """Write what some lanes have at a step, [lanes, …]."""
        while step >= len(self._values):
            self._values = torch.cat([self._values, torch.zeros_like(self._values)])
        self._values[step, lanes] = values

    def read(self, num_steps: int) -> Tensor:
        """Return the first steps, [num_steps, B, …]: a view."""
        return self._values[:num_steps]


@final
class RolloutBuilder:
    """Writes down the episodes of several resets, side by side, while they happen.

    After each reset `start`; then, as long as lanes are `active`, `add` before each step and `finish` after it; `build`
    at the end. Tensors are made once, of the size that the rollout will have.

    Args:
        env: The environment.
        num_resets: How often `start` will be called.
        storage: How large values are kept.
        keep: "steps": all that is needed to score the actions again; "ends": the last actions alone.
        max_images: How many images to keep.

    Attributes:
        active: [num_envs] bool: the lanes whose episodes have not ended.
    """

    _last_action: Tensor

    def __init__(
        self, env: TorchVectorEnv, num_resets: int, *, storage: Storage, keep: Keep = "steps", max_images: int = 16
    ) -> None:
        longest = env.num_steps if env.num_steps is not None else env.max_steps
        num_steps, num_episodes = longest or 1, num_resets * env.num_envs
        self._env, self._storage, self._keep = env, storage, keep
        self._num_steps, self._num_episodes = num_steps, num_episodes
        self._max_images = min(max(0, max_images), num_episodes)
        self._stores_latents_once = keep == "steps" and env.action_is_next_latents
        self._first_row = 1 if self._stores_latents_once else 0  # of actions: x_T lies before them
        self._observed: dict[str, Tape] = {}
        self._constants = DistinctRows()
        self._actions: Tape | None = None
        self._log_probs = Tape(torch.zeros(0, device=env.device), num_steps, num_episodes)
        self._scored = np.zeros((num_steps, num_episodes), dtype=bool)
        self._lengths = np.zeros(num_episodes, dtype=np.int64)
        self._valid = np.ones(num_episodes, dtype=bool)
        self._prompt_id = np.zeros(num_episodes, dtype=np.int64)
        self._returns = torch.zeros(num_episodes, device=env.device, dtype=torch.float32)
        self._extras: dict[str, Tensor] = {}
        self._images: Tensor | None = None
        self._rewards: list[tuple[slice, np.ndarray, Future[Rewards]]] = []
        self._lanes, self._step = slice(0, 0), 0
        self.active = np.zeros(env.num_envs, dtype=bool)

    def start(self, observation: Observation, info: Mapping[str, Any]) -> None:
        """Begin the episodes of a reset.

        Args:
            observation: [num_envs, …] each: the reset's, as the policy will see it.
            info: The reset's.
        """
        self._lanes, self._step = slice(self._lanes.stop, self._lanes.stop + self._env.num_envs), 0
        self.active = np.ones(self._env.num_envs, dtype=bool)
        self._prompt_id[self._lanes] = info["prompt_id"]
        constants = {key: value for key, value in observation.items() if key in self._env.constant_keys}
        self._constants.add(constants, info["prompt_id"])
        if self._stores_latents_once:
            self._write_action(0, observation["latents"])

    def add(self, observation: Observation, action: Tensor, log_prob: Tensor | None, scored: np.ndarray) -> None:
        """Write down a step that is about to be taken.

        Args:
            observation: [num_envs, …] each: what the policy saw.
            action: [num_envs, …] what it does.
            log_prob: [num_envs]; None if no action is scored.
            scored: [num_envs] bool on the host: the lanes whose log-probs mean something.
        """
        self._lengths[self._lanes] += self.active
        if log_prob is not None:
            self._log_probs.write(self._step, self._lanes, log_prob)
        while self._step >= len(self._scored):
            self._scored = np.concatenate([self._scored, np.zeros_like(self._scored)])
        self._scored[self._step, self._lanes] = scored
        if self._keep == "ends":
            active = to_device(self.active, action.device).reshape(-1, *[1] * (action.ndim - 1))
            self._last_action = action if self.active.all() else torch.where(active, action, self._last_action)
        else:
            self._write_observation(observation)
            self._write_action(self._first_row + self._step, action)

    def finish(self, rewards: Tensor, info: Mapping[str, Any]) -> None:
        """Take in what the environment answered to the step.

        Rewards that are still computed come as a future, `info["pending_rewards"]`; the others are made into a future
        that is done. `build` reads all of them.

        Args:
            rewards: [num_envs].
            info: The step's.

        Raises:
            ValueError: the lanes' episodes end apart from each other, and lanes that have ended reset themselves.
        """
        mode, ended = self._env.autoreset_mode, info["ended"] & self.active
        if ended.any():
            last = info["final_info"] if mode is AutoresetMode.SAME_STEP else info
            self._write_images(ended, last["images"])
            named = {key: value for key, value in last.items() if key.startswith("reward")}
            future = last["pending_rewards"] if "pending_rewards" in last else _done(rewards, named)
        else:
            future = _done(rewards, {})
        self._rewards.append((self._lanes, ended, future))
        self.active, self._step = self.active & ~ended, self._step + 1
        if ended.any() and self.active.any() and mode is not AutoresetMode.DISABLED:
            raise ValueError(
                "the lanes' episodes differ in length, and lanes that reset themselves would favour the short "
                'ones: make the environment with autoreset_mode="DISABLED"'
            )
        if self._keep == "ends" and not self.active.any():
            self._write_action(0, self._last_action)

    def build(self) -> Rollout:
        """Return the rollout, in which shorter episodes are filled up with zeros; waits for rewards still computed."""
        for lanes, ended, future in self._rewards:
            self._pay(lanes, ended, *future.result())
        assert self._actions is not None
        assert self._images is not None
        longest = int(self._lengths.max())
        scored = self._scored[:longest] & self._valid
        changing = {key: tape.read(longest) for key, tape in self._observed.items()}
        actions = self._actions.read(self._first_row + longest if self._keep == "steps" else 1)
        if self._stores_latents_once:
            changing["latents"], actions = actions[:-1], actions[1:]
        return Rollout(
            changing=changing,
            constants=self._constants.build(),
            actions=actions,
            log_probs=self._log_probs.read(longest).masked_fill(to_device(~scored, self._returns.device), 0.0),
            scored=scored,
            lengths=self._lengths,
            returns=self._returns,
            valid=self._valid,
            prompt_id=self._prompt_id,
            extras=self._extras,
            ends=self._storage.read(self._ends(actions), self._returns.device),
            images=self._images,
            storage=self._storage,
        )

    def _ends(self, actions: Tensor) -> Tensor:
        """Return the last action of each episode, [B, …]: a view where all episodes are of one length."""
        if self._keep == "ends" or (self._lengths == len(actions)).all():
            return actions[-1]
        steps, lanes = (
            to_device(index, actions.device) for index in (self._lengths - 1, np.arange(len(self._lengths)))
        )
        return actions[steps, lanes]

    def _write_observation(self, observation: Observation) -> None:
        """Write what changes within an episode, unless it is latents that are stored as the last step's action."""
        for key, values in observation.items():
            if key in self._env.constant_keys or (key == "latents" and self._stores_latents_once):
                continue
            if key not in self._observed:
                self._observed[key] = self._tape(values, self._num_steps, is_large=key in self._env.large_keys)
            self._observed[key].write(self._step, self._lanes, values)

    def _write_action(self, row: int, action: Tensor) -> None:
        if self._actions is None:
            num_rows = self._first_row + self._num_steps if self._keep == "steps" else 1
            self._actions = self._tape(action, num_rows, is_large=self._env.action_is_next_latents)
        self._actions.write(row, self._lanes, action)

    def _tape(self, values: Tensor, num_rows: int, *, is_large: bool) -> Tape:
        example = values[:0]
        return Tape(self._storage.stored(example) if is_large else example, num_rows, self._num_episodes)

    def _write_images(self, ended: np.ndarray, images: Tensor) -> None:
        """Write the images that are wanted of the lanes that ended, [num_envs, 3, H, W] for all lanes."""
        if self._images is None:
            self._images = images.new_zeros(self._max_images, *images.shape[1:])
        kept = self._images[self._lanes]
        _merge(kept, images[: len(kept)], ended[: len(kept)])

    def _pay(self, lanes: slice, ended: np.ndarray, rewards: Tensor, named: Mapping[str, Any]) -> None:
        """Add a step's rewards to the returns, and write down what is said of the rewards of lanes that it ended."""
        self._returns[lanes] += rewards
        if "reward_invalid" in named:
            self._valid[lanes] &= ~(ended & named["reward_invalid"])
        for key, values in named.items():
            if key.startswith("reward/"):
                if key not in self._extras:
                    self._extras[key] = values.new_zeros(self._num_episodes, *values.shape[1:])
                _merge(self._extras[key][lanes], values, ended)


def _merge(kept: Tensor, values: Tensor, ended: np.ndarray) -> None:
    """Overwrite what is kept of the lanes that ended with their values, [lanes, …] both."""
    mask = to_device(ended, values.device).reshape(-1, *[1] * (values.ndim - 1))
    kept.copy_(torch.where(mask, values, kept))


def _done(rewards: Tensor, named: Mapping[str, Any]) -> Future[Rewards]:
    future: Future[Rewards] = Future()
    future.set_result((rewards, named))
    return future
