"""Where the episodes of a run begin: each lane's seed and prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gymnasium.vector import VectorEnv

from .options import PromptSampling
from .seeding import derived_generator, derived_seed, in_turn, training_seed

_SEED_STREAM, _PROMPT_STREAM = 0, 4


@dataclass(frozen=True, eq=False)
class Starts:
    """The resets of a run's rollouts, a function of its seed, the iteration and the batch of lanes alone.

    Args:
        env: Its lanes are a batch; the prompts are its.
        seed: The run's.
        num_batches: Batches of a rollout, of all processes together.
        group_size: Lanes side by side that have one prompt.
        prompt_sampling: See `agents.options.Settings`.
        same_noise: Give the lanes of a group one seed: x_T is then the same too.
        num_starts: How many different groups there are in all, that is, seeds and prompts; None: no two are the same.
    """

    env: VectorEnv
    seed: int
    num_batches: int
    group_size: int
    prompt_sampling: PromptSampling
    same_noise: bool = False
    num_starts: int | None = None

    def reset(self, iteration: int, batch: int) -> tuple[int | Sequence[int], Mapping[str, Any] | None]:
        """Return `seed` and `options` of the reset that begins a batch."""
        seeds: int | list[int]
        prompts = self.env.unwrapped.prompts  # type: ignore[attr-defined]
        groups = self._groups(iteration, batch)
        if self.same_noise:
            seeds = [group for group in groups for _ in range(self.group_size)]
        elif self.group_size == 1:
            seeds = training_seed(self.seed, _SEED_STREAM, iteration, batch)
        else:
            seeds = [training_seed(group, sample) for group in groups for sample in range(self.group_size)]
        if self.prompt_sampling == "round_robin":
            first = (iteration * self.num_batches + batch) * len(groups)
            turns = range(first, first + len(groups))
            ids = [in_turn(len(prompts), turn, self.seed, _PROMPT_STREAM) for turn in turns]
        elif self.same_noise or self.group_size == 1:
            return seeds, None  # the environment draws prompts from the lanes' seeds
        elif prompts.weights:
            ids = [prompts.draw(derived_generator(group)) for group in groups]
        else:
            ids = [derived_seed(group) % len(prompts) for group in groups]
        return seeds, {"prompt_id": [index for index in ids for _ in range(self.group_size)]}

    def _groups(self, iteration: int, batch: int) -> list[int]:
        """Return a seed for each group of a batch."""
        groups = range(self.env.num_envs // self.group_size)
        keys = [(self.seed, _SEED_STREAM, iteration, batch, group) for group in groups]
        if self.num_starts is None:
            return [training_seed(*key) for key in keys]
        return [training_seed(self.seed, _SEED_STREAM, derived_seed(*key) % self.num_starts) for key in keys]
