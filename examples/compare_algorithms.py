"""All algorithms on the embedded model, at the same number of reward queries.

    python examples/compare_algorithms.py --quick

10 minutes on 2 cores, of which it needs one: two algorithms, one seed. Without `--quick` it is all algorithms, three
seeds and 2,240 images each: 10 to 20 minutes a run, hours. Every run leaves its curve in a CSV file and its state in a
checkpoint, so that the command can be stopped and given again, and so that several processes, each with some of the
`--algorithms` or `--seeds`, may share one folder. `runs/compare_algorithms` gets for each run `<algorithm>_<seed>.csv`
and some images of each evaluation, and of all `table.md`, `curves.png` and `images.png`. Beside the reward that is
trained for, the curves show one that is not, which tells what the gain is paid with; the images are those at which a
run first had +15 %.
"""

import csv
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import tyro
from gymnasium.vector import VectorEnv
from matplotlib.figure import Figure
from PIL import Image
from stable_baselines3.common.callbacks import BaseCallback

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    DDPOSF,
    GRPO,
    RLOO,
    RWR,
    AdamW,
    Best,
    Checkpoints,
    DenoisingPolicy,
    DiffusionNFT,
    Groups,
    Muon,
    Noising,
    PerPrompt,
    Rollouts,
    Softmax,
    Steps,
    Window,
    evaluate,
)
from agents.training.algorithm import Algorithm
from diffusion_gym.naming import unknown_name
from diffusion_gym.rewards import make_reward, to_uint8

_POLICY_GRADIENT = {"learning_rate": 1e-3, "optimizer": Muon(warmup_updates=4)}
_DDPO = {"advantages": PerPrompt(16, min_count=4, center=True)}
_CLIP = {"clip_range": 1e-4 * 16_384 / 1_024}
_RWR = {"learning_rate": 1e-4, "n_epochs": 1, "noising": Noising(draws=4)}
_NFT = {"learning_rate": 3e-4, "noising": Noising(draws=8, time_range=(0.8, 1.0), common=True)}
_ALGORITHMS: Mapping[str, tuple[Callable[..., Algorithm], Mapping[str, Any]]] = {
    "DDPO-IS": (DDPOIS, _POLICY_GRADIENT | _DDPO | _CLIP),
    "DDPO-SF": (DDPOSF, _POLICY_GRADIENT | _DDPO),
    "RLOO": (RLOO, _POLICY_GRADIENT | {"advantages": Groups(scale="rollout")}),
    "GRPO": (GRPO, _POLICY_GRADIENT | {"advantages": Groups("group_mean", scale="group")}),
    "RWR": (RWR, _RWR | {"weights": Softmax(3.0, per_prompt=True)}),
    "RWR-sparse": (RWR, _RWR | {"weights": Best(1 / 8, per_prompt=True)}),
    "NFT": (DiffusionNFT, _NFT | {"advantages": PerPrompt(8, min_count=4, clip=None)}),
    "DDPO-IS, plain": (DDPOIS, _DDPO | _CLIP | {"optimizer": AdamW(warmup_updates=4), "learning_rate": 2e-4}),
}
"""Each algorithm's class and settings; IS makes two updates of each rollout, the others one. The policy gradients learn
from the first steps alone, with Muon; the last line is the control: all steps, as they are, with AdamW. The published
clip range is for means of log-probs over the 16,384 numbers of Stable Diffusion's latents; the emoji's have 1,024."""
_NUM_SHOWN = 10


@dataclass
class Args:
    """A comparison of algorithms."""

    algorithms: tuple[str, ...] = tuple(_ALGORITHMS)
    """Which."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings; the evaluations' seeds are 0, 1, 2 … for all, which no training uses."""
    reward_queries: int = 2_240
    """Images that each run may have judged."""
    eval_every: int = 320
    """Images between two evaluations."""
    num_eval: int = 128
    """Held-out images of an evaluation; a multiple of num_envs."""
    reward: str = "incompressibility"
    """The name of the reward to train for."""
    held_out: str = "emoji_alignment"
    """The name of another, which is only looked at."""
    num_envs: int = 64
    """Images drawn together and learnt from."""
    group_size: int = 8
    """Of them, images of one prompt."""
    num_steps: int = 10
    """Denoising steps per image."""
    noisy_steps: int = 4
    """The first of them, which policy gradients make stochastic in training and learn from."""
    precision: Literal["auto", "bf16", "fp16"] | None = "auto"
    """Of the denoiser's arithmetic: "auto" is "bf16" where the device has instructions for it; None that of its
    weights."""
    quick: bool = False
    """RLOO and RWR with one seed and 640 images."""
    output: Path = Path("runs/compare_algorithms")
    """Where to write."""


def make_algorithm(name: str, env: VectorEnv, seed: int, args: Args) -> Algorithm:
    """Return an untrained run of one of the algorithms."""
    policy = DenoisingPolicy(env.unwrapped.model, precision=args.precision, seed=seed)
    algorithm, settings = _ALGORITHMS[name]
    rollouts = Rollouts(
        samples=args.num_envs,
        group_size=args.group_size,
        same_noise=algorithm in (RLOO, GRPO),
        prompt_sampling="round_robin",
    )
    options = {"optimizer": Muon(warmup_updates=4), "rollouts": rollouts, "seed": seed, **settings}
    if settings.get("learning_rate") == 1e-3:
        window = Window(args.noisy_steps, within=(0, args.noisy_steps))
        options["steps"] = Steps(weights="inverse_sensitivity", window=window)
    if algorithm is DDPOIS:
        options["batch_size"] = args.num_envs // 2
    return algorithm(policy, env, **options)


def read_curve(file: Path) -> dict[int, np.ndarray]:
    """Return a run's rewards on the held-out seeds by the number of reward queries before.

    Each is [2, num_eval]: the reward that is trained for, and the other one.
    """
    if not file.exists():
        return {}
    with file.open(newline="") as opened:
        rows = [[float(value) for value in row] for row in csv.reader(opened)]
    return {int(row[0]): np.array(row[1:]).reshape(2, -1) for row in rows}


def write_curve(file: Path, curve: Mapping[int, np.ndarray]) -> None:
    """Write what `read_curve` reads: whole, or not at all."""
    unfinished = file.with_suffix(".tmp")
    with unfinished.open("w", newline="") as opened:
        csv.writer(opened).writerows(
            [queries, *(f"{one:.4f}" for one in rewards.ravel())] for queries, rewards in curve.items()
        )
    unfinished.replace(file)


class Judge(BaseCallback):
    """Adds the rewards on held-out seeds to a run's curve, every `eval_every` images."""

    def __init__(self, file: Path, args: Args) -> None:
        super().__init__()
        self.file = file
        self.args = args
        self.held_out = make_reward(args.held_out)

    def _on_rollout_start(self) -> None:
        curve, queries = read_curve(self.file), self.model.reward_queries
        if queries % self.args.eval_every or queries in curve:
            return
        env, num_eval = self.model.get_env(), self.args.num_eval
        result = evaluate(env, self.model.policy, seeds=range(num_eval), max_images=num_eval)
        metadata = env.unwrapped.prompts.metadata_of(result.prompts)
        others = self.held_out(result.images, result.prompts, metadata)
        first = np.hstack(list(to_uint8(result.images[:_NUM_SHOWN]).numpy()))
        Image.fromarray(first).save(self.file.with_name(f"{self.file.stem}_{queries}.png"))
        write_curve(self.file, curve | {queries: np.stack([result.rewards, others.values.numpy()])})

    _on_training_end = _on_rollout_start

    def _on_step(self) -> bool:
        return True


def run(name: str, seed: int, args: Args) -> None:
    """Train one algorithm with one seed, from where an earlier call was stopped."""
    file = args.output / f"{name}_{seed}.csv"
    if args.reward_queries in read_curve(file):
        return
    started = time.monotonic()
    env = gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=args.num_envs,
        num_steps=args.num_steps,
        reward=args.reward,
        autoreset_mode="DISABLED",
    )
    algorithm = make_algorithm(name, env, seed, args)
    checkpoints = Checkpoints(args.output / "checkpoints" / f"{name}_{seed}", every=4, keep=1)
    if checkpoints.found() and read_curve(file):
        algorithm = type(algorithm).load(checkpoints.folder, env, policy=algorithm.policy)
    else:
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
        file.unlink(missing_ok=True)
    total = args.reward_queries * args.num_steps
    algorithm.learn(total - algorithm.num_timesteps, [Judge(file, args), checkpoints], reset_num_timesteps=False)
    print(f"{name}, seed {seed}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


def gain(curve: Mapping[int, np.ndarray], queries: int) -> float:
    """Return the mean reward's gain over the one before training, in per cent of it."""
    return 100 * float(curve[queries][0].mean() / curve[0][0].mean() - 1)


def reached(curve: Mapping[int, np.ndarray], per_cent: float) -> int | None:
    """Return the reward queries after which a gain was seen first; None: it never was."""
    return next((queries for queries in sorted(curve) if gain(curve, queries) >= per_cent), None)


def read_curves(name: str, args: Args) -> dict[int, dict[int, np.ndarray]]:
    """Return the curves of an algorithm's runs by their seeds."""
    curves = {seed: read_curve(args.output / f"{name}_{seed}.csv") for seed in args.seeds}
    return {seed: curve for seed, curve in curves.items() if len(curve) > 1}


def tabulate(args: Args) -> str:
    """Return a table of the runs that are there, each algorithm at the last evaluation that all its seeds have."""
    lines = [
        f"| algorithm | seeds | +6 % after | +15 % after | {args.held_out} then | queries | gain at the end, % | "
        f"{args.held_out} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in args.algorithms:
        curves = list(read_curves(name, args).values())
        if not curves:
            continue
        some, much = ([reached(curve, per_cent) for curve in curves] for per_cent in (6.0, 15.0))
        then = [curve[queries][1].mean() for curve, queries in zip(curves, much, strict=True) if queries is not None]
        last = max(set.intersection(*(set(curve) for curve in curves)))
        gains = np.array([gain(curve, last) for curve in curves])
        error = f" ± {gains.std(ddof=1) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else ""
        cells = [
            name,
            str(len(curves)),
            *(", ".join("not" if one is None else str(one) for one in column) for column in (some, much)),
            f"{np.mean(then):.2f}" if then else "–",
            str(last),
            f"{gains.mean():+.1f}{error}",
            f"{np.mean([curve[last][1].mean() for curve in curves]):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(args: Args) -> Figure:
    """Return the gain over the reward queries, and the other reward over the gain: mean and standard error of seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for number, name in enumerate(args.algorithms):
        curves = read_curves(name, args).values()
        if not curves:
            continue
        queries = sorted(set.intersection(*(set(curve) for curve in curves)))
        gains = np.array([[gain(curve, one) for one in queries] for curve in curves])
        others = np.array([[curve[one][1].mean() for one in queries] for curve in curves])
        errors = [values.std(0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else None for values in (gains, others)]
        style = {"color": f"C{number}", "marker": "o^sDvP*X"[number % 8], "markersize": 4, "capsize": 2}
        left.errorbar(queries, gains.mean(0), errors[0], label=name, **style)
        right.errorbar(gains.mean(0), others.mean(0), errors[1], errors[0], **style)
    left.set(xlabel="reward queries", ylabel=f"gain in {args.reward}, %, on held-out seeds")
    right.set(xlabel=f"gain in {args.reward}, %", ylabel=f"{args.held_out}, not trained for")
    left.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def draw_images(args: Args) -> Figure:
    """Return rows of images from the same noise: the pretrained model's, and each algorithm's with its first seed.

    They are of the evaluation at which +15 % was first seen; of the last one where it never was.
    """
    rows: dict[str, Path] = {}
    for name in args.algorithms:
        for seed, curve in list(read_curves(name, args).items())[:1]:
            queries = reached(curve, 15.0) or max(curve)
            rows.setdefault("pretrained", args.output / f"{name}_{seed}_0.png")
            label = f"{name}\n{gain(curve, queries):+.0f} % after {queries:,}"
            rows[label] = args.output / f"{name}_{seed}_{queries}.png"
    figure, panels = plt.subplots(len(rows), squeeze=False, figsize=(9, 0.85 * len(rows)), layout="constrained")
    for axes, (label, file) in zip(panels[:, 0], rows.items(), strict=True):
        axes.imshow(plt.imread(file))
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[], frame_on=False)
    return figure


def summarise(args: Args) -> None:
    """Write the table and the pictures of the runs that are there."""
    table = tabulate(args)
    (args.output / "table.md").write_text(table + "\n")
    print(table)
    for name, figure in (("curves", draw_curves(args)), ("images", draw_images(args))):
        figure.savefig(args.output / f"{name}.png", dpi=110, bbox_inches="tight")
        plt.close(figure)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.quick:
        args = replace(args, algorithms=("RLOO", "RWR"), seeds=(0,), reward_queries=640)
    for name in set(args.algorithms) - set(_ALGORITHMS):
        raise SystemExit(unknown_name("algorithm", name, _ALGORITHMS))
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.algorithms:
            run(name, seed, args)
    summarise(args)


if __name__ == "__main__":
    main()
