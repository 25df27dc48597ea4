"""Vector environments of torch tensors as NumPy arrays, and the other way round."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Dict, Space, Tuple
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import concatenate, create_empty_array, iterate
from torch import Tensor

from .. import transfer


def mapped(space: Space, value: Any, function: Callable[[Any, Space], Any]) -> Any:
    """Return a structure of a space with each leaf replaced by the function of it and its space."""
    if isinstance(space, Dict):
        return {key: mapped(space[key], value[key], function) for key in space}
    if isinstance(space, Tuple):
        return tuple(mapped(part, item, function) for part, item in zip(space, value, strict=True))
    return function(value, space)


def first_tensor(space: Space, value: Any) -> Tensor | None:
    """Return the first leaf that is a tensor."""
    if isinstance(space, Dict | Tuple):
        parts = space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces)
        found = (first_tensor(part, value[key]) for key, part in parts)
        return next((leaf for leaf in found if leaf is not None), None)
    return value if isinstance(value, Tensor) else None


def _leaf_as_array(leaf: Any, space: Space) -> Any:
    """Return a tensor as an array of its own memory, in the space's dtype; what is no tensor as it is."""
    return np.array(transfer.to_host(leaf), dtype=space.dtype) if isinstance(leaf, Tensor) else leaf


class TorchToNumpy(VectorWrapper):
    """A vector environment of torch tensors, as one of NumPy arrays.

    Observations are in the spaces' dtypes (half precision becomes float32), rewards float32, flags bool. Tensors in
    info become arrays; what is no tensor stays as it is, so texts are left alone. `final_obs`, a dict of batches with
    torch, is an array of one observation per lane, as in Gymnasium's own `SyncVectorEnv`. No array shares memory with
    a tensor.

    Behind it run Gymnasium's vector wrappers that compute in NumPy: `RecordEpisodeStatistics`, `NormalizeReward`,
    `TransformReward`, `RescaleAction` and the like. Every step waits for the device.

    Args:
        env: The environment, of torch tensors.
    """

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        self._like: Tensor | None = None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes; the arguments are those of the environment."""
        observation, info = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        self._like = first_tensor(self.single_observation_space, observation)
        return mapped(self.single_observation_space, observation, _leaf_as_array), self._as_arrays(info)

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one action in every lane, of the action space, as arrays."""
        observation, reward, terminated, truncated, info = self.env.step(
            mapped(self.single_action_space, actions, self._leaf_as_action)
        )
        return (
            mapped(self.single_observation_space, observation, _leaf_as_array),
            np.array(transfer.to_host(reward)),
            np.array(transfer.to_host(terminated)),
            np.array(transfer.to_host(truncated)),
            self._as_arrays(info),
        )

    def _leaf_as_action(self, leaf: Any, space: Space) -> Tensor:
        """Return an action as a tensor: on the observations' device, and a fraction in the first one's precision."""
        action = torch.from_numpy(np.array(leaf, dtype=space.dtype))
        if self._like is None:
            return action
        is_number = action.is_floating_point() and self._like.is_floating_point()
        return action.to(self._like.device, self._like.dtype if is_number else None)

    def _as_arrays(self, info: Mapping[str, Any]) -> dict[str, Any]:
        arrays: dict[str, Any] = {}
        for key, value in info.items():
            if key == "final_obs" and isinstance(value, Mapping):
                arrays[key] = self._one_per_lane(value, info["_final_obs"])
            elif isinstance(value, Mapping):
                arrays[key] = self._as_arrays(value)
            else:
                arrays[key] = np.array(transfer.to_host(value)) if isinstance(value, Tensor) else value
        return arrays

    def _one_per_lane(self, final: Mapping[str, Any], mask: Any) -> np.ndarray:
        """Return an array of the observations of the lanes of the mask; None for the others."""
        batch = mapped(self.single_observation_space, final, _leaf_as_array)
        lanes = np.full(self.num_envs, None, dtype=object)
        for lane, row in enumerate(iterate(self.observation_space, batch)):
            if mask[lane]:
                lanes[lane] = row
        return lanes


class NumpyToTorch(VectorWrapper):
    """A vector environment of NumPy arrays, as one of torch tensors on a device.

    Observations, rewards (float32) and flags become tensors. Info is left alone, texts and all, for what steers a loop
    belongs on the host; but `final_obs` becomes a batch, of which the lanes of `info["_final_obs"]` mean something, and
    `info["ended"]` [num_envs] bool is added: whether the lane's episode is over.

    Args:
        env: The environment, of NumPy arrays.
        device: The device of the tensors.
    """

    def __init__(self, env: VectorEnv, device: str | torch.device = "cpu") -> None:
        super().__init__(env)
        self.device = torch.device(device)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes; the arguments are those of the environment, and a mask may be a tensor."""
        if options:  # a copy: Gymnasium's own take the mask out of it
            options = {
                key: transfer.to_host(value) if isinstance(value, Tensor) else value for key, value in options.items()
            }
        observation, info = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        return self._as_tensors(observation), info | {"ended": np.zeros(self.num_envs, dtype=bool)}

    def step(self, actions: Any) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Take one action in every lane, of the action space, as tensors."""
        observation, reward, terminated, truncated, info = self.env.step(
            mapped(self.single_action_space, actions, _leaf_as_array)
        )
        info = info | {"ended": terminated | truncated}
        if "final_obs" in info:
            info["final_obs"] = self._as_tensors(self._as_batch(info["final_obs"]))
        return (
            self._as_tensors(observation),
            transfer.to_device(np.asarray(reward, dtype=np.float32), self.device),
            transfer.to_device(terminated, self.device),
            transfer.to_device(truncated, self.device),
            info,
        )

    def _as_tensors(self, observation: Any) -> Any:
        def tensor(leaf: Any, space: Space) -> Any:
            return transfer.to_device(leaf, self.device) if isinstance(leaf, np.ndarray) else leaf

        return mapped(self.single_observation_space, observation, tensor)

    def _as_batch(self, final: Any) -> Any:
        """Return a batch of an array of one observation per lane: those that are None repeat another."""
        if not isinstance(final, np.ndarray) or final.dtype != object:
            return final
        filled = next(row for row in final if row is not None)
        rows = [filled if row is None else row for row in final]
        space = self.single_observation_space
        empty: Any = create_empty_array(space, self.num_envs)
        return concatenate(space, rows, empty)
