"""Where, and how precisely, rollouts keep what is large."""

from dataclasses import dataclass

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from diffusion_gym.models.base import to_device

from ..policies.base import Observation

LARGE = ("latents", "features", "time_embedding")


@dataclass(frozen=True)
class Storage:
    """Where, and how precisely, a rollout keeps what is large: latents, features, and actions that are latents.

    Args:
        device: Where; None: where they are made. From another device they come back in micro-batches.
        dtype: How precisely, torch.float16 or torch.bfloat16 (which rounds latents 8 times as coarsely); None: as they
            come. What the policy sees, and its actions before they are scored, are rounded to it too: ratios before the
            first update are 1 all the same, and what is trained is a policy of rounded latents.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None

    def check(self, env: VectorEnv) -> None:
        """Raise ValueError if the device is not there, or the environment's precision not float32: rounded already."""
        if self.device is not None:
            to_device(str(self.device))
        own = env.unwrapped.dtype  # type: ignore[attr-defined]
        if self.dtype is not None and own != torch.float32:
            raise ValueError(f"the rollout cannot be stored in {self.dtype}: the environment's latents are {own}")

    def seen(self, observation: Observation) -> dict[str, Tensor]:
        """Return an observation as it will be remembered."""
        if self.dtype is None:
            return dict(observation)
        rounded = {key: observation[key].to(self.dtype).float() for key in LARGE if key in observation}
        return {**observation, **rounded}

    def kept(self, values: Tensor) -> Tensor:
        """Return large values as they are stored."""
        return values.to(device=self.device, dtype=self.dtype)

    def read(self, values: Tensor, device: torch.device) -> Tensor:
        """Return stored values as they were seen, on the device that they are needed on."""
        return values.to(device=device, dtype=torch.float32 if values.dtype == self.dtype else None)
