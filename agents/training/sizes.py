"""The sizes of a run: episodes of a rollout, an update and a group, transitions of a micro-batch."""

import warnings
from dataclasses import dataclass
from typing import final

from diffusion_gym.checks import checked_integer

from ..experience.rollouts import Rollouts

_CURE = (
    "; what you did not give is a default, or the saved run's: give rollouts=Rollouts(samples=…, group_size=…) and "
    "batch_size that fit num_envs, to load too"
)


@final
@dataclass(frozen=True)
class Sizes:
    """The sizes of a run, of all processes together but for the micro-batch.

    Args:
        samples: Episodes of a rollout.
        batch: Episodes that an update learns from.
        micro_batch: Transitions that a forward and backward pass of a process holds.
        group: Episodes side by side that have one prompt.
    """

    samples: int
    batch: int
    micro_batch: int
    group: int

    @classmethod
    def resolved(cls, rollouts: Rollouts, batch_size: int | None, *, num_envs: int, num_processes: int) -> "Sizes":
        """Return the sizes that an algorithm was given, or their defaults.

        Raises:
            ValueError: they do not divide each other.
        """
        together = num_envs * num_processes
        samples = together if rollouts.samples is None else rollouts.samples
        batch = samples if batch_size is None else checked_integer("batch_size", batch_size, at_least=1)
        micro_batch = num_envs if rollouts.micro_batch_size is None else rollouts.micro_batch_size
        if samples % together:
            times = f" × {num_processes} processes" if num_processes > 1 else ""
            raise ValueError(
                f"a rollout's samples must be a multiple of the environment's num_envs ({num_envs}){times}, "
                f"got {samples}{_CURE}"
            )
        if samples % batch:
            raise ValueError(f"batch_size must divide the rollout's samples ({samples}), got {batch}{_CURE}")
        if num_envs % rollouts.group_size:
            raise ValueError(f"group_size must divide num_envs ({num_envs}), got {rollouts.group_size}{_CURE}")
        if rollouts.async_rewards and samples == together:
            warnings.warn(
                "async_rewards has no effect: it hides rewards behind the next images of a rollout, and all of these "
                f"({together}) are drawn at once; give more samples, or fewer num_envs",
                stacklevel=4,
            )
        return cls(samples, batch, micro_batch, rollouts.group_size)
