"""Our vector environments as Stable-Baselines3's."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import Wrapper
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from diffusion_gym import transfer
from diffusion_gym.checks import checked_number
from diffusion_gym.models.base import DiffusionModel

from ...experience.environment import torch_env

Indices = int | Iterable[int] | None
Observations = dict[str, np.ndarray]

_SCALARS_PER_TRANSITION = 6  # reward, return, value, log-prob, advantage, and whether an episode begins
_NOT_PER_LANE = {"final_obs", "final_info"}


class DiffusionVecEnv(VecEnv):
    """A torch vector environment as Stable-Baselines3's `VecEnv`: numpy in and out, lanes that reset themselves.

    A step that ends an episode returns the next one's first observation; the last one is in that lane's
    `info["terminal_observation"]`, beside what the environment says of it: `reward/<name>`, `nfe`, `images` and so on.
    SB3's own `VecMonitor` around it counts returns and lengths, and `VecVideoRecorder` films it.

    SB3 wants finite bounds of actions, and clips to them what it hands to an environment: an action that was clipped is
    not the one that it learns from. So latents, which have no bounds, get some that are never reached; where one is,
    `step` raises.

    SB3 keeps rollouts in the host's memory, once as they come and once as `train` shuffles them, the largest array a
    third time meanwhile: `rollout_bytes` is the size of one.

    Args:
        env: What `gym.make_vec` returns, with autoreset_mode "SAME_STEP".
        action_bound: The bound of actions that have none in the environment. Untrained networks' latents reach 50.

    Attributes:
        env: The environment.

    Raises:
        TypeError: `env` is no torch vector environment.
        ValueError: its lanes do not reset themselves in the same step, or `action_bound` is no positive number.
    """

    metadata: dict[str, Any]

    def __init__(self, env: VectorEnv, *, action_bound: float = 1e3) -> None:
        self.env, self._base = env, torch_env(env)
        if self._base.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                "Stable-Baselines3 takes lanes that reset themselves in the same step: make the environment with "
                f'autoreset_mode="SAME_STEP", got {self._base.autoreset_mode.name}'
            )
        space = self._base.single_action_space
        self._has_bounds = bool(space.is_bounded())
        self._bound = checked_number("action_bound", action_bound, "(0, inf)")
        bounded = space if self._has_bounds else Box(-self._bound, self._bound, space.shape, np.float32)
        super().__init__(env.num_envs, env.single_observation_space, bounded)
        self.metadata = {"render_modes": [], "render_fps": 30, **env.metadata}
        self._actions = torch.empty(0)

    @property
    def model(self) -> DiffusionModel:
        """The environment's diffusion model: `policy_kwargs={"model": env.model}` loads no second one."""
        return self._base.model

    def rollout_bytes(self, n_steps: int) -> int:
        """Return the size of SB3's rollout buffer: n_steps · num_envs · (Σ bytes of observation and action + 6·4).

        At its peak, while `train` shuffles, the process has up to twice as much.

        Args:
            n_steps: Of PPO or A2C: steps per lane and rollout.
        """
        spaces = [*self.observation_space.spaces.values(), self.action_space]  # type: ignore[attr-defined]
        of_transition = sum(int(np.prod(space.shape)) * space.dtype.itemsize for space in spaces)
        return n_steps * self.num_envs * (of_transition + 4 * _SCALARS_PER_TRANSITION)

    def reset(self) -> Observations:
        """Start new episodes, with the seeds and options that `seed` and `set_options` gave."""
        seed = None if all(one is None for one in self._seeds) else list(self._seeds)
        observation, info = self.env.reset(seed=seed, options=self._reset_options_of_lanes())  # type: ignore[arg-type]
        self.reset_infos = _of_each_lane(info, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        return _to_numpy(observation)

    def _reset_options_of_lanes(self) -> dict[str, list[Any]] | None:
        keys = {frozenset(options) for options in self._options}
        if len(keys) > 1:
            raise ValueError(f"all lanes need the same options, got {[sorted(key) for key in keys]}")
        return {key: [options[key] for options in self._options] for key in self._options[0]} or None

    def step_async(self, actions: np.ndarray) -> None:
        """Take note of the actions [num_envs, …] of the next `step_wait`.

        Raises:
            ValueError: one has reached `action_bound`.
        """
        if not self._has_bounds and np.abs(actions).max() >= self._bound:
            raise ValueError(
                f"an action has reached the bound ±{self._bound:g}, where Stable-Baselines3 clips it and learns from "
                "another than was taken: give a larger action_bound, or a smaller learning rate if latents explode"
            )
        self._actions = torch.as_tensor(actions).to(self._base.device, self._base.dtype)

    def step_wait(self) -> tuple[Observations, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Take the step; return observations, rewards, dones and infos of the lanes."""
        observation, rewards, _, _, info = self.env.step(self._actions)
        infos = _of_each_lane(info, self.num_envs)
        if info["ended"].any():
            last, last_infos = _to_numpy(info["final_obs"]), _of_each_lane(info["final_info"], self.num_envs)
            for lane in np.flatnonzero(info["ended"]).tolist():
                terminal = {key: value[lane].copy() for key, value in last.items()}
                infos[lane] = {**last_infos[lane], "terminal_observation": terminal, "TimeLimit.truncated": False}
        return _to_numpy(observation), transfer.to_host(rewards), info["ended"].copy(), infos

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return one frame per lane."""
        frames: tuple[np.ndarray, ...] | None = self.env.render()  # type: ignore[assignment]
        return [None] * self.num_envs if frames is None else frames

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """Return an attribute of the vector environment, for each of some lanes the same."""
        return [getattr(self._base, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Set an attribute of the vector environment, and so of all lanes."""
        if indices is not None:
            raise ValueError(f"lanes have no attributes of their own: leave indices out, got {indices}")
        setattr(self._base, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Indices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the vector environment once; return what it returns for each of some lanes."""
        result = getattr(self._base, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[Wrapper], indices: Indices = None) -> list[bool]:
        """Return that no lane has a wrapper of its own."""
        return [False for _ in self._get_indices(indices)]


def _to_numpy(observation: Mapping[str, Tensor]) -> Observations:
    """Return float32 and int64 arrays, as the spaces say."""
    return {
        key: transfer.to_host(value.float() if value.is_floating_point() else value)
        for key, value in observation.items()
    }


def _of_each_lane(info: Mapping[str, Any], num_envs: int) -> list[dict[str, Any]]:
    arrays = {
        key: transfer.to_host(value) if isinstance(value, Tensor) else value
        for key, value in info.items()
        if not key.startswith("_") and key not in _NOT_PER_LANE
    }
    return [{key: value[lane] for key, value in arrays.items()} for lane in range(num_envs)]
