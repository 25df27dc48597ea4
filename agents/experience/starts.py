"""Where the episodes of a run begin: each one's seed and prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .rollouts import Rollouts
from .seeding import Stream, derived_generator, derived_seed, round_robin, training_seed


class Prompts(Protocol):
    """The prompt set of an environment."""

    @property
    def weights(self) -> Sequence[float]:
        """How likely each is drawn, in proportion; empty: all alike."""

    def __len__(self) -> int: ...

    def draw(self, generator: torch.Generator) -> int:
        """Return the index of a prompt, drawn by the weights."""


@dataclass(frozen=True, eq=False)
class Starts:
    """The seeds and prompts with which the episodes of a run begin.

    They are functions of the run's seed, the iteration and the episode's index in its rollout: the number of lanes and
    of processes that draw a rollout changes nothing.

    Args:
        prompts: The environment's prompt set.
        seed: The run's seed.
        num_episodes: The number of episodes of a rollout, of all processes together.
        rollouts: Says `group_size`, `prompt_sampling`, `same_noise` and `num_starts`; nothing else of it is used here.
    """

    prompts: Prompts
    seed: int
    num_episodes: int
    rollouts: Rollouts

    def reset(self, iteration: int, episodes: range) -> tuple[list[int], Mapping[str, Any] | None]:
        """Return `seed` and `options` for the reset of an environment that begins these episodes, one per lane.

        Args:
            iteration: The number of the rollout, from 0.
            episodes: Indices of episodes in the rollout, of whole groups.
        """
        size = self.rollouts.group_size
        groups = range(episodes.start // size, episodes.stop // size)
        group_seeds = [self._group_seed(iteration, group) for group in groups]
        prompt_ids = self._prompt_ids(iteration, groups, group_seeds)
        options = None if prompt_ids is None else {"prompt_id": [index for index in prompt_ids for _ in range(size)]}
        return [seed for group_seed in group_seeds for seed in self._lane_seeds(group_seed)], options

    def _group_seed(self, iteration: int, group: int) -> int:
        key = (self.seed, Stream.STARTS, iteration, group)
        if self.rollouts.num_starts is None:
            return training_seed(*key)
        return training_seed(self.seed, Stream.STARTS, derived_seed(*key) % self.rollouts.num_starts)

    @property
    def _lanes_share_their_seed(self) -> bool:
        return self.rollouts.same_noise or self.rollouts.group_size == 1

    def _lane_seeds(self, group_seed: int) -> list[int]:
        """Return the seed of each episode of a group."""
        if self._lanes_share_their_seed:
            return [group_seed] * self.rollouts.group_size
        return [training_seed(group_seed, sample) for sample in range(self.rollouts.group_size)]

    def _prompt_ids(self, iteration: int, groups: range, group_seeds: Sequence[int]) -> list[int] | None:
        """Return the prompt of each group; None: the environment draws them from the seeds that lanes are given."""
        if self.rollouts.prompt_sampling == "round_robin":
            before = iteration * (self.num_episodes // self.rollouts.group_size)
            return [round_robin(len(self.prompts), before + group, self.seed, Stream.PROMPTS) for group in groups]
        if self._lanes_share_their_seed:
            return None
        if self.prompts.weights:
            return [self.prompts.draw(derived_generator(seed)) for seed in group_seeds]
        return [derived_seed(seed) % len(self.prompts) for seed in group_seeds]
