"""What a `TorchVectorEnv` promises beyond Gymnasium's contract."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, get_origin, get_type_hints

import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv, VectorWrapper
from torch import Tensor

from ..envs.contract import TorchVectorEnv, missing_members
from .data import Row, difference, on_host
from .report import fault


def lacking(env: VectorEnv) -> str:
    """Return in words what an environment lacks to be a `TorchVectorEnv`; empty where it has all."""
    missing = missing_members(env)
    return (
        ""
        if not missing
        else (
            f"it lacks {', '.join(missing)}: diffusion_gym.envs.contract.TorchVectorEnv says what they are, and "
            "diffusion_gym.envs.core.DiffusionVectorEnv has them all"
        )
    )


def check_members(env: TorchVectorEnv) -> None:
    """Check that the members are what `TorchVectorEnv` says."""
    kind = type(env).__name__
    for name, member in vars(TorchVectorEnv).items():
        if isinstance(member, property):
            hint = get_type_hints(member.fget)["return"]
            value, origin = getattr(env, name), get_origin(hint)
            said = getattr(hint, "__name__", str(hint))
            if not isinstance(value, hint if origin in (None, UnionType) else origin):
                raise fault(f"must be of type {said}, got {value!r:.80}", key=f"{kind}.{name}")
    if env.metadata["autoreset_mode"] is not env.autoreset_mode:
        raise fault("must be the metadata's", key=f"{kind}.autoreset_mode")
    for name in ("constant_keys", "large_keys"):
        unknown = getattr(env, name) - set(env.single_observation_space)
        if unknown:
            what = f"must be keys of the observation, which has no {sorted(unknown)}"
            raise fault(what, key=f"{kind}.{name}")
    if env.times and len(env.times) - 1 != env.num_steps:
        raise fault(f"are {len(env.times)}, but num_steps is {env.num_steps}", key=f"{kind}.times")


def action_is_next_latents(env: VectorEnv) -> bool:
    """Return whether a step's action is the latents observed after it; a wrapper that changes actions says so."""
    layer: Any = env
    while isinstance(layer, VectorWrapper):
        if "action_is_next_latents" in vars(type(layer)):
            return bool(layer.action_is_next_latents)  # type: ignore[attr-defined]
        layer = layer.env
    return bool(layer.action_is_next_latents) and isinstance(env.single_action_space, Box)


def check_step(reward: Tensor, ended: np.ndarray, info: Mapping[str, Any], *, step: int) -> None:
    """Check that the reward is float32, and `info["ended"]` says on the host which lanes ended."""
    if reward.dtype != torch.float32:
        raise fault(f"must be float32, got {reward.dtype}", step=step, key="reward")
    said = info.get("ended")
    if not isinstance(said, np.ndarray):
        raise fault(f"must be a numpy array, got {type(said).__name__}", step=step, key="info['ended']")
    if said.tolist() != ended.tolist():
        raise fault(f"is {said.tolist()}, but the flags say {ended.tolist()}", step=step, key="info['ended']")


def check_final_info(final_info: Mapping[str, Any], reset_info: Mapping[str, Any], *, step: int) -> None:
    """Check that `final_info` has what every info has: what the reset's has."""
    missing = {key for key in reset_info if not key.startswith("_")} - set(final_info)
    if missing:
        raise fault(f"must have what info has, but lacks {sorted(missing)}", step=step, key="info['final_info']")


def check_lengths(env: TorchVectorEnv, lengths: set[int]) -> None:
    """Check that episodes take as many actions as the environment says."""
    for length in lengths:
        if env.num_steps is not None and length != env.num_steps:
            raise fault(f"is {env.num_steps}, but an episode took {length} actions", key="num_steps")
        if env.max_steps is not None and length > env.max_steps:
            raise fault(f"is {env.max_steps}, but an episode took {length} actions", key="max_steps")


def check_moved(env: VectorEnv, before: Row, after: Row, action: Tensor, *, step: int, lane: int) -> None:
    """Check that a lane's action has been taken, and has changed nothing that is said to be constant."""
    if difference(after, before) is None:
        raise fault("a step must change the observation, and the last one is final_obs", step=step, lane=lane)
    name = "observation['latents']"
    if action_is_next_latents(env):
        found = difference({name: after[name]}, {name: on_host(action[lane])})
        if found:
            raise fault(f"must be the action: {found[1]}", step=step, lane=lane, key=name)
    for key in sorted(env.unwrapped.constant_keys):  # type: ignore[attr-defined]
        name = f"observation[{key!r}]"
        found = difference({name: after[name]}, {name: before[name]})
        if found:
            what = f"is of constant_keys, but changed within an episode: {found[1]}"
            raise fault(what, step=step, lane=lane, key=name)
