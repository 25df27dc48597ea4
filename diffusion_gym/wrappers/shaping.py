"""A reward for every step, which leaves the best policies the best ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import Tensor, nn

from .. import transfer
from ..checks import checked_number
from ..envs.contract import TorchVectorEnv
from ..envs.lanes import lanes_to_reset
from ..rewards import Reward
from ..rewards.base import checked_output
from .ended import ended_lanes

Potential = Callable[[Mapping[str, Tensor]], Tensor]
"""The potential Φ [k] of observations [k, ...] of lanes that are in an episode."""


class PotentialShaping(VectorWrapper):
    """Pays γ·Φ(s') − Φ(s) in every step beside the environment's reward; Φ is 0 at an episode's end.

    With γ = 1 an episode's return is R − Φ(s_0), which no action changes: what is best stays best, for any Φ. So the
    potential need be neither the policy's nor exact; the better it foretells the reward, the earlier a step is paid.
    `PredictedReward` is one. `info["shaping"]` [num_envs] is what was added.

    Source: Ng, Harada & Russell, 1999, "Policy Invariance Under Reward Transformations".

    Note:
        An end is taken for a terminal state: an environment that truncates its episodes would be paid as if it were.

    Args:
        env: A vector environment of torch tensors whose info has `ended`: this package's, or behind `NumpyToTorch`.
        potential: Φ. It is only asked about lanes that are in an episode.
        gamma: γ in [0, 1], the algorithm's discount.
    """

    def __init__(self, env: VectorEnv, potential: Potential, *, gamma: float = 1.0) -> None:
        super().__init__(env)
        self._potential_of = potential
        self._gamma = checked_number("gamma", gamma, "[0, 1]")
        self._potential = torch.zeros(self.num_envs)
        self._over = np.zeros(self.num_envs, dtype=bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes; the arguments are those of the environment."""
        mask = lanes_to_reset(options, num_envs=self.num_envs)
        observation, info = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        device = next(iter(observation.values())).device
        fresh = self._potentials(observation, mask, device)
        self._potential = torch.where(
            transfer.to_device(mask, device), fresh, transfer.to_device(self._potential, device)
        )
        self._over = self._over & ~mask
        return observation, info

    def step(self, actions: Any) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Take one action in every lane."""
        observation, reward, terminated, truncated, info = self.env.step(actions)
        ended, mode = ended_lanes(info), self.env.metadata["autoreset_mode"]
        running = np.ones_like(ended) if mode is AutoresetMode.SAME_STEP else ~ended
        following = self._potentials(observation, running, reward.device)
        over, is_end = (transfer.to_device(mask, reward.device) for mask in (self._over, ended))
        shaping = self._gamma * torch.where(is_end, 0.0, following) - self._potential
        shaping = torch.where(over, 0.0, shaping)  # NEXT_STEP's step that resets, and DISABLED's lanes that rest
        self._potential, self._over = following, ended & (mode is not AutoresetMode.SAME_STEP)
        return observation, reward + shaping, terminated, truncated, info | {"shaping": shaping}

    def _potentials(self, observation: Mapping[str, Tensor], mask: np.ndarray, device: torch.device) -> Tensor:
        """Return Φ of the lanes of the mask, 0 for the others, [num_envs] float32."""
        lanes = transfer.to_device(np.flatnonzero(mask), device)
        potentials = torch.zeros(self.num_envs, device=device)
        if not mask.any():
            return potentials
        values = self._potential_of({key: value[lanes] for key, value in observation.items()})
        if not isinstance(values, Tensor) or values.shape != lanes.shape:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"the potential must be one number per lane, a tensor [{len(lanes)}], got {got}")
        return potentials.index_copy(0, lanes, values.detach().float())


class PredictedReward:
    """The reward of the image that the denoiser predicts now, r(decode(x̂_0(x_t))): a potential for `PotentialShaping`.

    It costs a network call, a decoding and a reward for every lane and step: T + 1 times the environment's own, of
    which `env.unwrapped.reward_queries` counts none.

    Args:
        env: The environment that will be wrapped: its model, prompts and reward are taken.
        reward: Another reward; None: the environment's.
        denoiser: Another denoiser, such as a policy's; None: the frozen one. One that is trained meanwhile changes Φ.
        guidance_scale: Its guidance; None: the model's default.
        weight: A factor.

    Raises:
        TypeError: the environment has no diffusion model.
    """

    def __init__(
        self,
        env: VectorEnv,
        *,
        reward: Reward | None = None,
        denoiser: nn.Module | None = None,
        guidance_scale: float | None = None,
        weight: float = 1.0,
    ) -> None:
        bare: object = env.unwrapped
        if not isinstance(bare, TorchVectorEnv):
            raise TypeError(f"the predicted reward needs an environment of this package, got {env}")
        self._model, self._prompts, self._negative_prompt = bare.model, bare.prompts, bare.negative_prompt
        self._reward = bare.reward if reward is None else reward
        self._denoiser = denoiser
        self._guidance_scale = bare.model.guidance_scale_of(guidance_scale)
        self._weight = checked_number("weight", weight)

    @torch.no_grad()
    def __call__(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Return weight · r(decode(x̂_0)), [k]; it waits for the device.

        Raises:
            ValueError: a lane's prompt is a text that was given to `reset`, and not of the prompt set.
        """
        ids = transfer.to_host(observation["prompt_id"][:, 0])
        if (ids < 0).any():
            raise ValueError("the predicted reward knows prompts by their index: put every text into prompts=")
        texts = [self._prompts[int(index)] for index in ids]
        conditioning = self._model.encode_prompts(texts, self._negative_prompt)
        prediction = self._model.denoise(
            observation["latents"],
            observation["timestep"][:, 0],
            conditioning,
            guidance_scale=self._guidance_scale,
            denoiser=self._denoiser,
        )
        metadata = [self._prompts.metadata[int(index)] for index in ids]
        images = self._model.decode(prediction.x0)
        return self._weight * checked_output(self._reward, images, texts, metadata).values.float()
