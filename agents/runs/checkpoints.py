"""Checkpoints of a running training: the newest few are whole, even if it is killed or the disk is full."""

import warnings
from pathlib import Path
from typing import final

from stable_baselines3.common.callbacks import BaseCallback

from ..training.algorithm import Algorithm
from ..training.learner import Learner
from .files import clear_leftovers, remove_folder
from .manifest import CHECKPOINT_PREFIX, checkpoint_name, find_checkpoints, find_damage, iteration_of
from .saving import require_savable


@final
class Checkpoints(BaseCallback):
    """A callback that saves between two iterations and at the end of the training.

    `Algorithm.load(folder, env)` takes the newest whole one:

        checkpoints = Checkpoints("runs/foxes", every=10)
        algorithm = DDPOIS.load("runs/foxes", env) if checkpoints.found() else DDPOIS(policy, env, seed=0)
        algorithm.learn(total - algorithm.num_timesteps, checkpoints, reset_num_timesteps=False)

    is a script that can be killed at any moment and started again: on a CPU it ends with the same weights, bit for bit.

    An error of the disk (it is full, for instance) does not end the training: a warning says so, `checkpoint/failed` in
    the log counts it, and the older checkpoints stay. (Where processes share weights it does end.) The disk needs room
    for `keep` + 1. The main process alone writes; all have to be able to read the folder, to go on.

    Args:
        folder: The folder of the checkpoints, `iteration_00000010` …; each is a folder that `Algorithm.save` writes.
        every: Iterations (rollouts learnt from; a `Learner`'s updates) between two of them.
        keep: The number of whole ones that are kept. An older one goes only when a newer one is safe on the disk.

    Attributes:
        failed: The number of checkpoints that could not be written.

    Raises:
        ValueError: `every` or `keep` is below 1; or, when the training starts, the folder has whole checkpoints of
            later iterations than the algorithm's, that is, of another run.
        TypeError: when the training starts, the algorithm has arguments that `save` does not know of.
    """

    def __init__(self, folder: str | Path, *, every: int = 1, keep: int = 3) -> None:
        super().__init__()
        if every < 1 or keep < 1:
            raise ValueError(f"every and keep must be at least 1, got {every} and {keep}")
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self.failed = 0
        self._last_saved = 0
        self._whole: list[Path] = []

    def found(self) -> list[Path]:
        """Return the checkpoints that are in the folder, whole or not, the oldest first."""
        return find_checkpoints(self.folder)

    @property
    def _algorithm(self) -> Algorithm | Learner:
        assert isinstance(self.model, Algorithm | Learner)
        return self.model

    def _on_training_start(self) -> None:
        require_savable(self._algorithm)
        self._last_saved = self._algorithm.iteration
        if not self._algorithm.processes.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(self.folder, CHECKPOINT_PREFIX)
        # Hashes of many gigabytes take minutes: `load` looks at those of the one that it takes, and here they matter
        # only where a checkpoint would be another run's.
        self._whole = [
            checkpoint
            for checkpoint in self.found()
            if find_damage(checkpoint, hashes=iteration_of(checkpoint) > self._last_saved) is None
        ]
        if self._whole and iteration_of(self._whole[-1]) > self._last_saved:
            raise ValueError(
                f"{self.folder} has a checkpoint of iteration {iteration_of(self._whole[-1])}, and this run is at "
                f"{self._last_saved}: go on from it, {type(self._algorithm).__name__}.load(folder, env), or give "
                "another folder"
            )

    def _on_rollout_start(self) -> None:
        if self._algorithm.iteration % self.every == 0:
            self._save()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._save()

    def _save(self) -> None:
        """Write a checkpoint of this iteration, unless there is one, and remove the oldest."""
        iteration = self._algorithm.iteration
        processes = self._algorithm.processes
        if iteration == self._last_saved or not (processes.is_main or processes.share_weights):
            return
        path = self.folder / checkpoint_name(iteration)
        try:
            self._algorithm.save(path)
            self._last_saved = iteration
            if processes.is_main:
                self._whole.append(path)
                self._rotate()
        except OSError as error:
            self.failed += 1
            warnings.warn(f"checkpoint {path}: {error}; the training goes on, older checkpoints stay", stacklevel=2)
        self.logger.record("checkpoint/failed", self.failed)

    def _rotate(self) -> None:
        """Remove the checkpoints that are older than the newest `keep` whole ones."""
        self._whole = self._whole[-self.keep :]
        if len(self._whole) == self.keep:
            for checkpoint in self.found():
                if iteration_of(checkpoint) < iteration_of(self._whole[0]):
                    remove_folder(checkpoint)
