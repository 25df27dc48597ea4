"""The score: what is gained while nothing else is lost.

Of a trial it is the largest gain on the trained reward, in per cent of the task's whole (the pretrained model's mean,
unless the task says another), at an evaluation up to which the held-out reward was shown to stay within δ of the
pretrained model's: the lower end of its one-sided 95 % interval over prompts was above −δ there and at all evaluations
before. The pretrained model itself scores 0.

Of an algorithm it is the interquartile mean over the seeds, with a bootstrap interval (Agarwal et al., 2021, "Deep
Reinforcement Learning at the Edge of the Statistical Precipice", https://arxiv.org/abs/2108.13264).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..evaluation.statistics import Interval
from .trial import CURVE_FILE, RUN_FILE

_RESAMPLES = 9_999


@dataclass(frozen=True, eq=False)
class Trial:
    """A finished trial.

    Args:
        folder: Where it is.
        run: What `run.json` says of it.
        curve: The columns of `curve.csv`, [evaluations] each, by name.
    """

    folder: Path
    run: dict[str, Any]
    curve: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> "Trial":
        """Return the trial in a folder."""
        table = np.genfromtxt(folder / CURVE_FILE, delimiter=",", names=True, ndmin=1)
        assert table.dtype.names is not None
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return cls(folder, run, {name: table[name] for name in table.dtype.names})

    @property
    def algorithm(self) -> str:
        """The algorithm's name."""
        return str(self.run["algorithm"])

    @property
    def gains(self) -> np.ndarray:
        """The gain at each evaluation, in per cent of the task's whole."""
        whole = self.run["task"]["whole"]
        return 100 * self.curve["gain"] / (abs(self.curve["reward"][0]) if whole is None else whole)

    @property
    def is_held(self) -> np.ndarray:
        """Whether the held-out reward had stayed within the tolerance up to each evaluation."""
        within = self.curve["held_out_low"] >= -self.run["task"]["tolerance"]
        within[0] = True
        return np.logical_and.accumulate(within)

    @property
    def best(self) -> int:
        """The evaluation with the largest gain of those at which nothing was lost."""
        return int(np.where(self.is_held, self.gains, -np.inf).argmax())

    @property
    def score(self) -> float:
        """The gain there, in per cent."""
        return float(self.gains[self.best])

    @property
    def queries(self) -> int:
        """The reward queries up to there."""
        return int(self.curve["queries"][self.best])

    @property
    def unconstrained(self) -> float:
        """The largest gain at any price."""
        return float(self.gains.max())


def read_trials(folders: Iterable[Path]) -> list[Trial]:
    """Return all finished trials in some folders, those of other machines too; of the same trial the first."""
    found: dict[tuple[str, str, int], Trial] = {}
    for folder in folders:
        for file in sorted(Path(folder).rglob(RUN_FILE)):
            trial = Trial.read(file.parent)
            key = (trial.run["task"]["name"], trial.algorithm, trial.run["seed"])
            found.setdefault(key, trial)
    return list(found.values())


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the mean of the middle half: without the lowest and the highest quarter, rounded down."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval_of(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the interquartile mean over seeds with its 95 % percentile bootstrap interval; of one value, itself."""
    sample = np.array(values, dtype=float)
    middle = float(interquartile_mean(sample))
    if len(sample) < 2 or not np.ptp(sample):
        return Interval(middle, middle, middle)
    bounds = stats.bootstrap(
        (sample,),
        interquartile_mean,
        n_resamples=_RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(middle, float(bounds.low), float(bounds.high))


def profile(scores: Sequence[float], levels: np.ndarray) -> np.ndarray:
    """Return the share of trials whose score is above each level, [L]: the performance profile."""
    return (np.array(scores)[:, None] > levels).mean(0)


@dataclass(frozen=True, eq=False)
class Standing:
    """An algorithm on a task, over its seeds.

    Args:
        algorithm: The algorithm's name.
        trials: Its trials, one for each seed.
    """

    algorithm: str
    trials: Sequence[Trial]

    @cached_property
    def score(self) -> Interval:
        """The interquartile mean of the scores, in per cent."""
        return interval_of([trial.score for trial in self.trials])

    @cached_property
    def unconstrained(self) -> Interval:
        """That of the largest gains at any price."""
        return interval_of([trial.unconstrained for trial in self.trials])

    @property
    def scores(self) -> list[float]:
        """Each trial's score."""
        return [trial.score for trial in self.trials]

    def median(self, column: str, *, at_best: bool = False) -> float:
        """Return the median over seeds of a column of the curve, at the end or where the score was reached."""
        return float(np.median([trial.curve[column][trial.best if at_best else -1] for trial in self.trials]))

    @property
    def queries(self) -> float:
        """The median reward queries to the score."""
        return float(np.median([trial.queries for trial in self.trials]))

    @property
    def problems(self) -> list[str]:
        """What makes trials none of the protocol's."""
        return [f"seed {trial.run['seed']}: {text}" for trial in self.trials for text in trial.run["problems"]]


def standings(trials: Sequence[Trial], task: str) -> list[Standing]:
    """Return a task's algorithms, the best score first."""
    by_algorithm: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.run["task"]["name"] == task:
            by_algorithm.setdefault(trial.algorithm, []).append(trial)
    every = [Standing(name, sorted(found, key=_seed)) for name, found in by_algorithm.items()]
    return sorted(every, key=lambda standing: standing.score.mean, reverse=True)


def _seed(trial: Trial) -> int:
    return int(trial.run["seed"])
