"""Where the episodes of a run begin: each one's seed and prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..training.options import PromptSampling
from .seeding import derived_generator, derived_seed, in_turn, training_seed

_SEED_STREAM, _PROMPT_STREAM = 0, 4


class Prompts(Protocol):
    """The prompt set of an environment."""

    weights: Sequence[float] | None

    def __len__(self) -> int: ...

    def draw(self, generator: torch.Generator) -> int:
        """Return the index of a prompt, drawn by the weights."""


@dataclass(frozen=True, eq=False)
class Starts:
    """The resets of a run's rollouts.

    An episode's is a function of the run's seed, the iteration, and the episode's index in the rollout alone: how many
    lanes and processes draw it with others changes nothing.

    Args:
        prompts: The environment's.
        seed: The run's.
        num_episodes: Episodes of a rollout, of all processes together.
        group_size: Episodes side by side that have one prompt.
        prompt_sampling: See `agents.training.options.Settings`.
        same_noise: Give the episodes of a group one seed: x_T is then the same too.
        num_starts: How many different groups there are in all, that is, seeds and prompts; None: no two are the same.
    """

    prompts: Prompts
    seed: int
    num_episodes: int
    group_size: int
    prompt_sampling: PromptSampling
    same_noise: bool = False
    num_starts: int | None = None

    def reset(self, iteration: int, episodes: range) -> tuple[Sequence[int], Mapping[str, Any] | None]:
        """Return `seed` and `options` of the reset that begins some episodes, whole groups of them."""
        groups = range(episodes.start // self.group_size, episodes.stop // self.group_size)
        group_seeds = [self._group_seed(iteration, group) for group in groups]
        if self.same_noise or self.group_size == 1:
            seeds = [seed for seed in group_seeds for _ in range(self.group_size)]
        else:
            seeds = [training_seed(seed, sample) for seed in group_seeds for sample in range(self.group_size)]
        if self.prompt_sampling == "round_robin":
            before = iteration * (self.num_episodes // self.group_size)
            ids = [in_turn(len(self.prompts), before + group, self.seed, _PROMPT_STREAM) for group in groups]
        elif self.same_noise or self.group_size == 1:
            return seeds, None  # the environment draws prompts from the lanes' seeds
        elif self.prompts.weights:
            ids = [self.prompts.draw(derived_generator(seed)) for seed in group_seeds]
        else:
            ids = [derived_seed(seed) % len(self.prompts) for seed in group_seeds]
        return seeds, {"prompt_id": [index for index in ids for _ in range(self.group_size)]}

    def _group_seed(self, iteration: int, group: int) -> int:
        key = (self.seed, _SEED_STREAM, iteration, group)
        if self.num_starts is None:
            return training_seed(*key)
        return training_seed(self.seed, _SEED_STREAM, derived_seed(*key) % self.num_starts)
