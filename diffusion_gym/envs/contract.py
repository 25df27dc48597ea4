"""The contract of a torch vector environment with policies, algorithms and adapters, whatever its dynamics."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode
from torch import Tensor
from typing_extensions import get_protocol_members

from ..models.base import DiffusionModel
from ..prompts import PromptSet
from ..rewards import Reward

Observation = dict[str, Tensor]


@runtime_checkable
class TorchVectorEnv(Protocol):
    """A vector environment whose observations, actions, rewards and flags are torch tensors on one device.

    B is the number of lanes. What `agents` looks at beside the members:

    | where | key | |
    |---|---|---|
    | observation | `latents`, `timestep`, `next_timestep` | what a `DenoisingPolicy` looks at |
    | options of `reset` | `prompt`, `prompt_id`, `reset_mask` | the prompts of the lanes; which lanes are reset |
    | every info | `ended` | [B] bool, numpy: the lane's episode is over; with "DISABLED" until its reset |
    | | `prompt_id`, `nfe` and the times | [B] numpy: index of the prompt (−1: none), actions taken |
    | info at the end of an episode | `images` | [B, 3, H, W] of the lanes that ended |
    | | `reward/<name>`, `reward_invalid` | [B] each reward by its name; whether it is NaN or infinite |
    | with "SAME_STEP" | `final_obs`, `final_info` | the last observation and info of the lanes that ended |

    `diffusion_gym.testing.check_vector_env` checks that an environment is one. `envs.core.DiffusionVectorEnv` has all
    of it: a subclass states only what it changes.
    """

    @property
    def num_envs(self) -> int:
        """B, the number of lanes."""

    @property
    def device(self) -> torch.device:
        """The device of observations, actions, rewards and flags."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision of latents and actions."""

    @property
    def model(self) -> DiffusionModel:
        """The diffusion model; its weights are frozen."""

    @property
    def prompts(self) -> PromptSet:
        """The prompts, in the order of `prompt_id`."""

    @property
    def reward(self) -> Reward:
        """The reward of the final images."""

    @property
    def negative_prompt(self) -> str:
        """The text that classifier-free guidance moves away from."""

    @property
    def observe_embeds(self) -> bool:
        """Whether the observation has the embeddings of the prompts; else a policy looks them up by `prompt_id`."""

    @property
    def num_steps(self) -> int | None:
        """The number of actions of every episode; None where it differs between episodes."""

    @property
    def times(self) -> tuple[float, ...]:
        """The `num_steps` + 1 times that every episode goes through; () where they differ between episodes."""

    @property
    def max_steps(self) -> int | None:
        """The most actions of an episode; None where `num_steps` gives their number."""

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """Gymnasium's mode of resetting lanes whose episode has ended; the same as `metadata["autoreset_mode"]`."""

    @property
    def constant_keys(self) -> frozenset[str]:
        """The keys of the observation that do not change within an episode: those of the prompt."""

    @property
    def large_keys(self) -> frozenset[str]:
        """The keys of the observation that change and take memory: x_t and the network's features of it."""

    @property
    def action_is_next_latents(self) -> bool:
        """Whether a step's action is the latents that are observed after it."""

    @property
    def reward_seconds(self) -> float:
        """The seconds spent so far in decoding and rewarding final images."""

    @property
    def reward_queries(self) -> int:
        """The images rewarded so far."""

    @property
    def spec(self) -> EnvSpec | None:
        """Gymnasium's record of the `gym.make_vec` call that made it; None if it was made otherwise."""

    @property
    def metadata(self) -> dict[str, Any]:
        """Gymnasium's metadata: `autoreset_mode`, `render_modes` and `render_fps`."""

    @property
    def single_observation_space(self) -> Dict:
        """The space of one lane's observation."""

    @property
    def single_action_space(self) -> Box:
        """The space of one lane's action."""

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start new episodes; return their first observations, [B, ...] each, and an info dict.

        Args:
            seed: Lane i is seeded with seed + i, or with the i-th of a sequence; None goes on with the streams.
            options: See above; an unknown key raises.
        """
        ...

    def step(self, actions: Tensor) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Take one action in every lane, [B, ...] of `dtype` on `device`.

        Returns:
            The observation, the reward [B] float32, terminated and truncated [B] bool, and an info dict (see above).
        """
        ...

    def deferred_rewards(self) -> AbstractContextManager[None]:
        """The context in which rewards may be computed in a thread while lanes go on.

        The info of a last step may then have `pending_rewards`, the future of (rewards [B], entries for that info).
        """
        ...


def missing_members(env: object) -> list[str]:
    """Return the members of `TorchVectorEnv` that an object lacks, sorted; none where it is one."""
    return sorted(member for member in get_protocol_members(TorchVectorEnv) if not hasattr(env, member))
