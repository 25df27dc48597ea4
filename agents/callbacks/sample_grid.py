"""Grids of a learner's samples in TensorBoard, as the training goes on."""

from collections.abc import Sequence
from typing import final

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Image

from diffusion_gym.checks import checked_integer

from ..logs.images import captioned_grid
from ..training.learner import Learner


@final
class SampleGrid(BaseCallback):
    """A callback that draws the same noises again and again, with few steps each, at the end too.

    Args:
        prompts: The prompts, one image each.
        every: Updates between two grids.
        num_steps: The numbers of steps, each a grid of its own, `images/1_steps` ….

    Raises:
        ValueError: `every` is below 1, or there are no prompts.
    """

    def __init__(self, prompts: Sequence[str], *, every: int = 100, num_steps: Sequence[int] = (1, 2, 4)) -> None:
        super().__init__()
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a sequence of texts, got {prompts!r}")
        self.prompts = list(prompts)
        self.every = checked_integer("every", every, at_least=1)
        self.num_steps = tuple(num_steps)

    def _on_rollout_start(self) -> None:
        if self._learner.iteration % self.every == 0:
            self._draw()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._draw()
        self.logger.dump(self._learner.num_timesteps)

    @property
    def _learner(self) -> Learner:
        assert isinstance(self.model, Learner)
        return self.model

    def _draw(self) -> None:
        if not self._learner.processes.is_main:
            return
        for count in self.num_steps:
            images = self._learner.draw(self.prompts, num_steps=count, seeds=range(len(self.prompts)))
            grid = captioned_grid(images, [(prompt, "") for prompt in self.prompts])
            self.logger.record(f"images/{count}_steps", Image(grid, "HWC"), exclude=("stdout", "log", "json", "csv"))
