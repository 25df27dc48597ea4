"""One trial: one algorithm with one seed on one task, judged as it goes, on images and prompts that it never sees."""

import csv
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from PIL import Image
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor
from typing_extensions import override

from diffusion_gym.rewards import RewardOutput, make_reward
from diffusion_gym.rewards.base import Metadata
from diffusion_gym.rewards.compositions import RewardWrapper
from diffusion_gym.rewards.names import REFERENCE_DISTANCE

from ..evaluation.measures import Samples, draw_samples, latent_features, make_features
from ..evaluation.statistics import distance_between, distance_within, mean_interval
from ..experience.environment import torch_env
from ..policies import Policy
from ..runs.checkpoints import Checkpoints
from ..training.algorithm import Algorithm
from .entrants import find_entrant
from .tasks import PROTOCOL, Task, digest_of, find_task

if sys.platform != "win32":
    import resource

RUN_FILE, CURVE_FILE, REWARDS_FILE = "run.json", "curve.csv", "rewards.csv"
_SHOWN = 10
_PACKAGES = ("diffusion-gym", "torch", "diffusers", "gymnasium", "numpy")


class Metered(RewardWrapper):
    """The task's reward, which counts the images that it is shown, whoever asks.

    Attributes:
        count: The images so far.
    """

    count = 0

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        self.count += len(images)
        return self.reward(images, prompts, metadata)


class Budget:
    """The reward queries of a trial, as an algorithm may look at them.

    Args:
        task: The task.

    Attributes:
        env: The environment to train in.
        total: The images that may be judged.
        earlier: Those that were judged before the trial was interrupted.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.total = task.reward_queries
        self.earlier = 0
        self._meter = None if task.reward == REFERENCE_DISTANCE else Metered(task.reward)
        self.env = task.make_env(self._meter)

    @property
    def spent(self) -> int:
        """The images judged so far, whoever asked."""
        asked = torch_env(self.env).reward_queries if self._meter is None else self._meter.count
        return self.earlier + asked

    @property
    def left(self) -> int:
        """The images that may still be judged; negative: too many were."""
        return self.total - self.spent

    def make_policy(self, env: VectorEnv, seed: int) -> Policy:
        """Return the policy that all algorithms train on this task, untrained."""
        return self.task.make_policy(env, seed)


class Examiner:
    """Judges policies on held-out seeds, in an environment of its own, and writes a trial's curve.

    Args:
        budget: The trial's.
        folder: Where `curve.csv`, `rewards.csv` and some images are written; what is there is gone on with.

    Attributes:
        judged: The reward queries at which there was an evaluation.
    """

    def __init__(self, budget: Budget, folder: Path) -> None:
        self.budget, self.folder, self.task = budget, folder, budget.task
        self._env = self.task.make_env()
        self._held_out = make_reward(self.task.held_out)
        has_scorer = self.task.held_out == "emoji_alignment"
        self._features = make_features("emoji_scorer") if has_scorer else latent_features
        self._rows = _read(folder / CURVE_FILE)
        self._before: Samples | None = None
        self._reference: Policy | None = None
        last = self._rows[-1] if self._rows else {"cpu_seconds": 0.0, "wall_seconds": 0.0}
        self._spent_before = np.array([float(last["cpu_seconds"]), float(last["wall_seconds"])])
        self._clock = _clocks()

    @property
    def judged(self) -> list[int]:
        """The reward queries of all evaluations."""
        return [int(row["queries"]) for row in self._rows]

    @property
    def is_due(self) -> bool:
        """Whether so many queries were spent since the last evaluation that the next is due."""
        return self.budget.spent >= self.judged[-1] + self.task.eval_every

    def start(self, policy: Policy) -> None:
        """Draw what the untrained policy draws, which all else is compared with, and judge it."""
        self._reference = policy.reference() if policy.reference_is_free else None
        self._before = self._draw(policy if self._reference is None else self._reference)
        if not self._rows:
            self._write(self._before)
        self._clock = _clocks()

    def judge(self, policy: Policy) -> None:
        """Write how the policy stands; its images cost no queries and no time."""
        used = _clocks() - self._clock
        self._spent_before = self._spent_before + used
        self._write(self._draw(policy))
        self._clock = _clocks()

    def finish(self, policy: Policy) -> None:
        """Judge the policy that the training ends with, unless that was just done."""
        if self.budget.spent != self.judged[-1]:
            self.judge(policy)

    def _draw(self, policy: Policy) -> Samples:
        return draw_samples(
            self._env,
            policy,
            prompts=torch_env(self._env).prompts.texts,
            samples_per_prompt=self.task.samples_per_prompt,
            held_out=self._held_out,
            features=self._features,
            reference=self._reference if policy is not self._reference else None,
        )

    def _write(self, now: Samples) -> None:
        before = self._before
        assert before is not None
        assert before.held_out is not None
        assert now.held_out is not None
        gains = (now.rewards - before.rewards).mean(1)
        changes = (now.held_out - before.held_out).mean(1)
        gain, change = mean_interval(gains), mean_interval(changes, confidence=0.9)
        queries = self.budget.spent
        row: dict[str, Any] = {
            "queries": queries,
            "cpu_seconds": self._spent_before[0],
            "wall_seconds": self._spent_before[1],
            "peak_memory_mib": _peak_memory(),
            "reward": now.rewards.mean(),
            "held_out": now.held_out.mean(),
            "gain": gain.mean,
            "gain_low": gain.low,
            "gain_high": gain.high,
            "held_out_change": change.mean,
            "held_out_low": change.low,
            "diversity": distance_within(now.features).mean() if now.rewards.shape[1] > 1 else float("nan"),
            "moved": distance_between(before.features, now.features).mean(),
            "kl": float("nan") if now.kl is None else now.kl.mean(),
        }
        self._rows.append({key: f"{value:.6g}" for key, value in row.items()} | {"queries": str(queries)})
        _write_rows(self.folder / CURVE_FILE, self._rows)
        values = {"reward": now.rewards, "held_out": now.held_out}
        earlier = [one for one in _read(self.folder / REWARDS_FILE) if int(one["queries"]) != queries]
        rows = [
            {"queries": str(queries), "prompt": prompt, "sample": str(k)}
            | {name: f"{matrix[row, k]:.6g}" for name, matrix in values.items()}
            for row, prompt in enumerate(now.prompts)
            for k in range(now.rewards.shape[1])
        ]
        _write_rows(self.folder / REWARDS_FILE, earlier + rows)
        if now.images.shape[2] > 1:
            Image.fromarray(np.hstack(list(now.images[:_SHOWN, 0]))).save(self.folder / f"images_{queries}.png")


class _Judging(BaseCallback):
    """Judges an algorithm's policy between its rollouts, and ends the training where the next would cost too much."""

    def __init__(self, examiner: Examiner) -> None:
        super().__init__()
        self.examiner = examiner
        self._is_over = False

    @property
    def _algorithm(self) -> Algorithm:
        assert isinstance(self.model, Algorithm)
        return self.model

    def _on_rollout_start(self) -> None:
        if self.examiner.is_due:
            self.examiner.judge(self._algorithm.policy)
        self._is_over = self.examiner.budget.left < self._algorithm.sizes.samples

    def _on_step(self) -> bool:
        return not self._is_over

    def _on_training_end(self) -> None:
        self.examiner.finish(self._algorithm.policy)


def run_trial(task_name: str, entrant: str, seed: int, folder: Path) -> Path:
    """Run one algorithm with one seed on a task, from where an earlier call was stopped; return the trial's folder.

    `run.json` in it, with what was found to be wrong, is written last: a trial that has none is not finished.

    Args:
        task_name: The task.
        entrant: The algorithm, as `find_entrant` knows it.
        seed: The seed of the training.
        folder: The folder of all trials.
    """
    task, place = find_task(task_name), trial_folder(folder, task_name, entrant, seed)
    if (place / RUN_FILE).exists():
        return place
    place.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    budget = Budget(task)
    model = torch_env(budget.env).model
    digest = digest_of(model)
    started = find_entrant(entrant)(budget.env, budget, seed)
    checkpoints = Checkpoints(place / "checkpoints", every=4, keep=1)
    if isinstance(started, Algorithm) and checkpoints.found() and (place / CURVE_FILE).exists():
        started = type(started).load(checkpoints.folder, budget.env, policy=started.policy)
        budget.earlier = started.reward_queries
        _forget_after(place, budget.earlier)
    else:
        for left_over in (checkpoints.folder, place / CURVE_FILE, place / REWARDS_FILE):
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink(missing_ok=True)
    examiner = Examiner(budget, place)
    _train(started, examiner, checkpoints, seed)
    problems = _problems(budget, digest, task.model_sha256, digest_of(model))
    description = {
        "protocol": PROTOCOL,
        "task": task.described(),
        "algorithm": entrant,
        "seed": seed,
        "model_sha256": digest,
        "reward_queries": budget.spent,
        "num_prompts": len(torch_env(budget.env).prompts.texts),
        "unit": torch_env(budget.env).reward.unit,
        "problems": problems,
        "settings": {key: str(value) for key, value in started.hyperparameters().items()}
        if isinstance(started, Algorithm)
        else {},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": _versions(),
    }
    shutil.rmtree(checkpoints.folder, ignore_errors=True)
    unfinished = place / (RUN_FILE + ".tmp")
    unfinished.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(place / RUN_FILE)
    return place


def _train(
    started: Algorithm | Policy | Iterator[Policy], examiner: Examiner, checkpoints: Checkpoints, seed: int
) -> None:
    """Let the algorithm spend its budget, and judge what it has at hand as it goes."""
    budget, task = examiner.budget, examiner.task
    examiner.start(task.make_policy(budget.env, seed))
    if isinstance(started, Algorithm):
        # The callback ends the training; that many steps are more than any training of the budget takes.
        env = torch_env(budget.env)
        most = (env.num_steps or env.max_steps or 1) * (budget.total + env.num_envs)
        started.learn(most, [_Judging(examiner), checkpoints], reset_num_timesteps=False)
        return
    last = None
    for policy in [started] if isinstance(started, Policy) else started:
        if not isinstance(policy, Policy):
            raise TypeError(f"an algorithm must return or yield a Policy of agents.policies, got {policy!r:.80}")
        last = policy
        if examiner.is_due:
            examiner.judge(policy)
    if last is None:
        raise ValueError("the algorithm yielded no policy, so there is nothing to judge")
    examiner.finish(last)


def _problems(budget: Budget, digest: str, expected: str | None, afterwards: str) -> list[str]:
    """Return in words what makes a trial none of the protocol's."""
    problems = []
    if budget.left < 0:
        problems.append(f"{budget.spent} images were judged, and the task has {budget.total}")
    if expected is not None and digest != expected:
        problems.append(f"the model's files have the digest {digest[:12]}, and the task's {expected[:12]}")
    if afterwards != digest:
        problems.append("the model's files changed during the training")
    return problems


def trial_folder(folder: Path, task: str, entrant: str, seed: int) -> Path:
    """Return the folder of a trial."""
    return Path(folder) / task / entrant.replace(":", ".").replace("/", "_") / f"seed_{seed}"


def _forget_after(place: Path, queries: int) -> None:
    """Drop evaluations that a resumed training will make again."""
    for name in (CURVE_FILE, REWARDS_FILE):
        _write_rows(place / name, [row for row in _read(place / name) if int(row["queries"]) <= queries])


def _read(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def _write_rows(file: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write a table, whole or not at all."""
    unfinished = file.with_suffix(".tmp")
    with unfinished.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]) if rows else ["queries"])
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(file)


def _clocks() -> np.ndarray:
    return np.array([time.process_time(), time.monotonic()])


def _peak_memory() -> float:
    """Return the most memory that this process has had, in MiB: the device's on a GPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
