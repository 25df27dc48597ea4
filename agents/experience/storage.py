"""Where, and how precisely, rollouts keep what is large."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_gym.envs.contract import TorchVectorEnv
from diffusion_gym.models.base import to_device

from ..policies.base import Observation


@dataclass(frozen=True)
class Storage:
    """Where, and how precisely, a rollout keeps large values: latents, features, and actions that are latents.

    Args:
        device: The device that keeps them; None: the one that they are made on. From another device they come back in
            micro-batches.
        dtype: The precision that they are kept in, torch.float16 or torch.bfloat16 (which rounds latents 8 times as
            coarsely); None: as they come. What the policy sees is rounded to it too, and so are its actions before they
            are scored: ratios before the first update are 1 all the same, and a policy of rounded latents is trained.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None

    def check(self, env: TorchVectorEnv) -> None:
        """Check that the values of an environment can be kept so.

        Raises:
            ValueError: the device is not there; or the environment's latents are not float32, so rounded already.
        """
        if self.device is not None:
            to_device(str(self.device))
        if self.dtype is not None and env.dtype != torch.float32:
            raise ValueError(
                f"the rollout cannot be stored in {self.dtype}: the environment's latents are {env.dtype}; leave the "
                "rollout's dtype at None, or make the environment in float32"
            )

    def rounded(self, observation: Observation, large_keys: Collection[str]) -> dict[str, Tensor]:
        """Return an observation with its large values as they will be read again."""
        if self.dtype is None:
            return dict(observation)
        return {key: value.to(self.dtype).float() if key in large_keys else value for key, value in observation.items()}

    def stored(self, values: Tensor) -> Tensor:
        """Return large values as they are kept."""
        return values.to(device=self.device, dtype=self.dtype)

    def read(self, values: Tensor, device: torch.device) -> Tensor:
        """Return kept values as they were seen, on the device that they are needed on."""
        return values.to(device=device, dtype=torch.float32 if values.dtype == self.dtype else None)
