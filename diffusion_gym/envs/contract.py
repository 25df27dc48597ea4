"""What policies and algorithms may ask of a torch vector environment."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Space
from gymnasium.vector import AutoresetMode

from ..models.base import DiffusionModel
from ..prompts import PromptSet
from ..rewards import Reward


@runtime_checkable
class TorchVectorEnv(Protocol):
    """A vector environment of torch tensors on one device (a stopgap: the environments' rebuild brings the real one)."""

    num_envs: int
    device: torch.device
    dtype: torch.dtype
    model: DiffusionModel
    prompts: PromptSet
    reward: Reward
    negative_prompt: str
    observe_embeds: bool
    num_steps: int | None
    max_steps: int | None
    autoreset_mode: AutoresetMode
    constant_keys: frozenset[str]
    large_keys: frozenset[str]
    action_is_next_latents: bool
    reward_seconds: float
    reward_queries: int
    spec: EnvSpec | None
    metadata: dict[str, Any]
    single_observation_space: Space
    single_action_space: Space

    def reset(self, *, seed: Any = None, options: Any = None) -> Any: ...  # noqa: D102

    def step(self, actions: Any) -> Any: ...  # noqa: D102

    def deferred_rewards(self) -> AbstractContextManager[None]: ...  # noqa: D102
