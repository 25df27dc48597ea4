"""RL on a consistency model against RL on the diffusion model that it was distilled from: over queries and seconds.

    python benchmarks/consistency_rl.py

The same algorithm, RLOO in groups of eight with Muon, trains `emoji_consistency` in `ConsistencyMDP-v0` with 4 steps
and `emoji` in `DenoisingMDP-v0` with 10, for one reward and then for the other; the one that is not trained for is
looked at beside. Every run leaves a CSV file: a row per evaluation with the reward queries and CPU seconds of the
training before it, and both rewards of the images from held-out seeds. So the command can be stopped and given again (a
run begins anew), and several processes may share one folder. All that is there goes into `table.md` and `curves.png`.
"""

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from stable_baselines3.common.callbacks import BaseCallback

import diffusion_gym  # noqa: F401
from agents import KL, RLOO, DenoisingPolicy, Groups, Muon, Rollouts, Steps, Window, evaluate
from diffusion_gym.rewards import make_reward, to_uint8

REWARDS = ("incompressibility", "emoji_alignment")
LANES, GROUP = 64, 8


@dataclass(frozen=True)
class Setting:
    """A model in its environment, and how it is trained there."""

    env_id: str
    model: str
    num_steps: int
    learning_rate: float
    steps: Steps
    kl: float | None
    queries: int


SETTINGS = {
    "consistency": Setting(
        "ConsistencyMDP-v0",
        "emoji_consistency",
        4,
        5e-4,
        Steps(weights="inverse_sensitivity"),
        kl=0.05,
        queries=640,
    ),
    "denoising": Setting(
        "DenoisingMDP-v0",
        "emoji",
        10,
        1e-3,
        Steps(weights="inverse_sensitivity", window=Window(4, within=(0, 4))),
        kl=None,
        queries=960,
    ),
}
"""The denoising MDP's are those of `examples/compare_algorithms.py`. The pull to the model before training is what
keeps the images: see `docs/consistency_uses.md`."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A run: after so many queries and CPU seconds of training the two rewards of N held-out images.

    Args:
        queries: [R] int.
        seconds: [R].
        rewards: [R, 2, N], first the reward that is trained for.
    """

    queries: np.ndarray
    seconds: np.ndarray
    rewards: np.ndarray

    def gains(self) -> np.ndarray:
        """The mean gain of both rewards over the model before training, [R, 2]."""
        means = self.rewards.mean(-1)
        return means - means[0]


def read_curve(file: Path) -> Curve:
    """Return what a run has written so far."""
    rows = np.array([[float(value) for value in row] for row in csv.reader(file.open(newline=""))])
    return Curve(rows[:, 0].astype(int), rows[:, 1], rows[:, 2:].reshape(len(rows), 2, -1))


class Judge(BaseCallback):
    """Writes a run's curve; its own seconds are not the training's."""

    def __init__(self, file: Path, held_out: str, *, at: Sequence[int], num_images: int) -> None:
        super().__init__()
        self.file, self.at, self.num_images = file, at, num_images
        self.held_out = make_reward(held_out)
        self.rows: list[list[float]] = []
        self.seconds = 0.0

    def _on_training_start(self) -> None:
        self.resumed = time.process_time()

    def _on_rollout_start(self) -> None:
        self.seconds += time.process_time() - self.resumed
        queries = self.model.reward_queries
        if queries in self.at and (not self.rows or self.rows[-1][0] != queries):
            env = self.model.get_env()
            result = evaluate(env, self.model.policy, seeds=range(self.num_images), max_images=self.num_images)
            metadata = env.unwrapped.prompts.metadata_of(result.prompts)
            others = self.held_out(result.images, result.prompts, metadata).values.numpy()
            self.rows.append([queries, self.seconds, *result.rewards, *others])
            with self.file.open("w", newline="") as opened:
                csv.writer(opened).writerows([[f"{value:.4f}" for value in row] for row in self.rows])
            shown = [np.hstack(list(to_uint8(result.images[start : start + 16]).numpy())) for start in (0, 16)]
            Image.fromarray(np.vstack(shown)).save(self.file.with_name(f"{self.file.stem}_{queries}.png"))
        self.resumed = time.process_time()

    _on_training_end = _on_rollout_start

    def _on_step(self) -> bool:
        return True


def run(name: str, reward: str, seed: int, args: argparse.Namespace) -> None:
    """Train one model with one seed, unless that has been done."""
    setting = SETTINGS[name]
    file = args.output / f"{name}{args.tag}_{reward}_{seed}.csv"
    queries, kl = args.queries or setting.queries, setting.kl if args.kl is None else args.kl
    if file.is_file() and read_curve(file).queries[-1] >= queries:
        return
    env = gym.make_vec(
        setting.env_id,
        num_envs=LANES,
        model=args.model if name == "consistency" and args.model else setting.model,
        reward=reward,
        autoreset_mode="DISABLED",
        **({"times": args.times} if name == "consistency" and args.times else {"num_steps": setting.num_steps}),
    )
    algorithm = RLOO(
        DenoisingPolicy(env.unwrapped.model, precision="auto", seed=seed),
        env,
        learning_rate=args.learning_rate or setting.learning_rate,
        optimizer=Muon(warmup_updates=4),
        rollouts=Rollouts(samples=LANES, group_size=GROUP, same_noise=True, prompt_sampling="round_robin"),
        advantages=Groups(scale="rollout"),
        steps=setting.steps,
        kl=KL(kl) if kl else None,
        seed=seed,
    )
    held_out = next(other for other in REWARDS if other != reward)
    judge = Judge(file, held_out, at=(0, *args.eval_at, queries), num_images=args.num_eval)
    algorithm.learn(queries * env.unwrapped.num_steps, judge)
    print(f"{file.stem}: {judge.seconds:.0f} CPU seconds of training", flush=True)


def mean_and_error(values: np.ndarray) -> str:
    """Return the mean of the seeds' values, and its standard error."""
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{values.mean():+.3f}{error}"


def summarise(output: Path) -> None:
    """Write the table and the curves of all runs that are there."""
    runs: dict[str, list[Curve]] = {}
    for file in sorted(output.glob("*.csv")):
        runs.setdefault(file.stem.rpartition("_")[0], []).append(read_curve(file))
    lines = ["| run | seeds | queries | CPU s | gain | gain, % | the other reward |", "|---|---|---|---|---|---|---|"]
    figure, axes = plt.subplots(3, len(REWARDS), figsize=(11, 11), layout="constrained", squeeze=False)
    for number, (name, curves) in enumerate(runs.items()):
        rows = min(len(curve.queries) for curve in curves)
        gains = np.array([curve.gains()[:rows] for curve in curves])
        before = np.array([curve.rewards[0, 0].mean() for curve in curves])
        queries, seconds = curves[0].queries[:rows], np.array([curve.seconds[:rows] for curve in curves]).mean(0)
        for row in range(1, rows):
            cells = [
                name,
                str(len(curves)),
                str(queries[row]),
                f"{seconds[row]:.0f}",
                mean_and_error(gains[:, row, 0]),
                mean_and_error(100 * gains[:, row, 0] / before),
                mean_and_error(gains[:, row, 1]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        column = next(index for index, reward in enumerate(REWARDS) if f"_{reward}" in name)
        errors = gains.std(0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else np.zeros_like(gains[0])
        style = {"color": f"C{number}", "marker": "o^sDvP*X"[number % 8], "markersize": 4, "capsize": 2, "label": name}
        for place, x in ((0, queries), (1, seconds)):
            axes[place, column].errorbar(x, gains[:, :, 0].mean(0), errors[:, 0], **style)
        axes[2, column].errorbar(gains[:, :, 0].mean(0), gains[:, :, 1].mean(0), errors[:, 1], errors[:, 0], **style)
    for column, reward in enumerate(REWARDS):
        for place, label in enumerate(("reward queries", "CPU seconds of training", f"gain in {reward}")):
            axes[place, column].set(xlabel=label, ylabel=f"gain in {reward}")
            axes[place, column].grid(alpha=0.3)
        axes[2, column].set(ylabel=f"gain in {REWARDS[1 - column]}, not trained for")
        axes[0, column].legend(fontsize="small")
    (output / "table.md").write_text("\n".join(lines) + "\n")
    figure.savefig(output / "curves.png", dpi=100)
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rewards", nargs="*", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--queries", type=int, help="reward queries of a run, a multiple of 64; 640 and 960 by default")
    parser.add_argument(
        "--eval-at", nargs="*", type=int, default=[192, 320, 448, 640], help="reward queries before an evaluation"
    )
    parser.add_argument("--num-eval", type=int, default=128, help="images of an evaluation, a multiple of 64")
    parser.add_argument("--model", help="another consistency model")
    parser.add_argument("--times", nargs="*", type=float, help="other times of the consistency model")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument(
        "--kl", type=float, help="another coefficient of the pull to the model before training; 0: none"
    )
    parser.add_argument("--tag", default="", help="added to the names of the runs")
    parser.add_argument("--output", type=Path, default=Path("runs/consistency_rl"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for reward in args.rewards:
            for name in args.settings:
                run(name, reward, seed, args)
    summarise(args.output)


if __name__ == "__main__":
    main()
