"""One lane of a vector environment as a numpy environment."""

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import InvalidAction
from gymnasium.wrappers import TimeLimit
from torch import Tensor

from .. import transfer
from ..models.base import DiffusionModel
from ..prompts import PromptSet
from .contract import Observation
from .core import DiffusionVectorEnv
from .options import HasSpec, signature_of


class DiffusionEnv(HasSpec, gym.Env[dict[str, np.ndarray], np.ndarray]):
    """One lane of a vector environment, as a numpy environment.

    Args:
        lane: A vector environment with one lane and autoreset disabled.
        max_steps: The most actions that an episode takes.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, *, lane_of: type[DiffusionVectorEnv] | None = None) -> None:
        """Show the vector environment's keywords in the signature of the single one.

        Args:
            lane_of: The vector environment; None: that of the base.
        """
        super().__init_subclass__()
        if lane_of is not None:
            cls.__signature__ = signature_of(lane_of, without=("num_envs", "autoreset_mode"))

    def __init__(self, lane: DiffusionVectorEnv, *, max_steps: int) -> None:
        self.lane = lane
        self._max_steps = max_steps
        self._limit_is_checked = False
        self.render_mode = lane.render_mode
        self.metadata = {key: lane.metadata[key] for key in lane.metadata if key != "autoreset_mode"}
        self.observation_space = copy.deepcopy(lane.single_observation_space)  # type: ignore[arg-type]
        self.action_space = copy.deepcopy(lane.single_action_space)

    @property
    def model(self) -> DiffusionModel:
        """The diffusion model."""
        return self.lane.model

    @property
    def prompts(self) -> PromptSet:
        """The prompts, in the order of `prompt_id`."""
        return self.lane.prompts

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start a new episode; `seed` and `options` (but `reset_mask`) as in the vector environment's lane 0."""
        super().reset(seed=seed)
        if not self._limit_is_checked:
            self._limit_is_checked = True
            self._warn_of_time_limit()
        if options is not None and "latents" in options:
            options = {**options, "latents": np.asarray(options["latents"])}
        observation, info = self.lane.reset(seed=seed, options=options)
        return self._single(observation), self._single_info(info)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Take one action, a float array of the action space's shape.

        Raises:
            ClosedEnvironmentError, ResetNeeded, InvalidAction: as in the vector environment.
        """
        array = np.asarray(action)
        if array.shape != self.action_space.shape or not np.issubdtype(array.dtype, np.floating):
            raise InvalidAction(
                f"the action must be a float array of shape {list(self.action_space.shape or ())}; "
                f"got shape {list(array.shape)}, {array.dtype}"
            )
        batched = torch.from_numpy(array[None].astype(np.float32)).to(self.lane.device, self.lane.dtype)
        observation, reward, terminated, truncated, info = self.lane.step(batched)
        flags = (transfer.to_host(flag).item() for flag in (reward, terminated, truncated))
        return self._single(observation), *flags, self._single_info(info)

    def render(self) -> np.ndarray | None:
        """Return the frame [H, W, 3] uint8 of x_t, or of x_0 when the episode has ended."""
        frames = self.lane.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Let go of the model's tensors; closing twice is harmless."""
        self.lane.close()

    def _warn_of_time_limit(self) -> None:
        """Warn if a `TimeLimit` around this environment would cut its episodes before their only reward.

        Gymnasium tells an environment nothing of its wrappers; but a reset comes through them.
        """
        frame = inspect.currentframe()
        while frame is not None:
            wrapper = frame.f_locals.get("self")
            if isinstance(wrapper, TimeLimit) and wrapper.unwrapped is self:
                limit = wrapper._max_episode_steps
                if limit < self._max_steps:
                    warnings.warn(
                        f"max_episode_steps={limit} cuts episodes, which take up to {self._max_steps} steps, before "
                        "their only reward: leave it out, or make the episodes shorter (num_steps=…, max_steps=…)",
                        stacklevel=2,
                    )
            frame = frame.f_back

    def _single(self, observation: Observation) -> dict[str, np.ndarray]:
        return {
            key: transfer.to_host(value[0].float() if value.is_floating_point() else value[0]).copy()
            for key, value in observation.items()
        }

    def _single_info(self, info: dict[str, Any]) -> dict[str, Any]:
        """Return lane 0 of an info dict, without the masks, as numpy."""
        single: dict[str, Any] = {}
        for key, value in info.items():
            if not key.startswith("_"):
                lane = transfer.to_host(value[0]) if isinstance(value, Tensor) else value[0]
                single[key] = lane.copy() if lane.ndim else lane.item()
        return single
