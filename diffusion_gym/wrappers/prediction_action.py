"""The denoising MDP with the denoiser's output as its action."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import Tensor

from .. import transfer
from ..envs.contract import TorchVectorEnv
from ..envs.lanes import lane_seeds, lanes_to_reset
from ..samplers import Sampler
from ..schedules import as_float
from ..transitions import transition
from .ended import ended_lanes


class PredictionAction(VectorWrapper):
    """The action is what the denoiser predicts, ε̂ (or v, x̂_0, the velocity: the model's kind); the wrapper makes x_s.

        x_s ~ N(x0·x̂_0 + epsilon·ε̂, std²)   with the sampler's scales of the step from t to s

    An actor is then a plain network from observation to noise, as in supervised learning, and the transition's own
    noise is the environment's: drawn per lane and episode, from the seed of `reset`. A policy gradient through it is
    not DDPO's, whose policy is the transition: give the actor a density of its own.

    Args:
        env: A vector environment whose action is the next latents: `DenoisingMDP-v0`.
        sampler: The sampler; None: the model's.

    Raises:
        TypeError: the environment's action is something else.
    """

    action_is_next_latents = False

    def __init__(self, env: VectorEnv, sampler: Sampler | None = None) -> None:
        super().__init__(env)
        bare: object = env.unwrapped
        if not isinstance(bare, TorchVectorEnv) or not bare.action_is_next_latents:
            raise TypeError(f"the action of the environment must be the next latents, as in DenoisingMDP-v0; got {env}")
        self._model, self._dtype = bare.model, bare.dtype
        self._sampler = bare.model.default_sampler if sampler is None else sampler
        self._of_lane = [torch.Generator() for _ in range(self.num_envs)]
        self._of_episode = [torch.Generator() for _ in range(self.num_envs)]
        for generator in self._of_lane:
            generator.seed()
        self._over = np.zeros(self.num_envs, dtype=bool)
        self._latents = self._t = self._s = torch.empty(0)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes; the arguments are those of the environment."""
        mask = lanes_to_reset(options, num_envs=self.num_envs)
        observation, info = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        for lane, lane_seed in enumerate(lane_seeds(seed, self.num_envs)):
            if mask[lane] and lane_seed is not None:
                self._of_lane[lane].manual_seed(lane_seed ^ 2**63)  # not the stream that draws x_T
        self._begin(mask)
        self._over = self._over & ~mask
        self._look(observation)
        return observation, info

    def step(self, actions: Tensor) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Take one step in every lane.

        Args:
            actions: [num_envs, C, H, W] the denoiser's (guided) output at the latents last observed.
        """
        pred_x0, pred_epsilon = self._model.to_x0_and_epsilon(as_float(actions), as_float(self._latents), self._t)
        scales = self._sampler.scales(self._model.schedule, self._t, self._s)
        latents = transition(pred_x0, pred_epsilon, scales).sample(self._of_episode).to(self._dtype)
        observation, reward, terminated, truncated, info = self.env.step(latents)
        ended, mode = ended_lanes(info), self.env.metadata["autoreset_mode"]
        if mode is AutoresetMode.SAME_STEP:
            self._begin(ended)
        elif mode is AutoresetMode.NEXT_STEP:
            self._begin(self._over)
        self._over = ended
        self._look(observation)
        return observation, reward, terminated, truncated, info

    def _begin(self, mask: np.ndarray) -> None:
        """Seed the noise of new episodes in the lanes of the mask, whatever the ones before have drawn."""
        for lane in np.flatnonzero(mask).tolist():
            seed = torch.randint(2**63 - 1, (), generator=self._of_lane[lane])
            self._of_episode[lane].manual_seed(int(transfer.to_host(seed)))

    def _look(self, observation: dict[str, Tensor]) -> None:
        """Remember x_t, t and s."""
        self._latents = observation["latents"].clone()
        self._t, self._s = (observation[key][:, 0].clone() for key in ("timestep", "next_timestep"))
