"""All algorithms on the embedded model, at the same number of reward queries.

    python examples/compare_algorithms.py --quick

15 minutes on 2 cores: two algorithms, one seed. Without `--quick` it is all algorithms, three seeds and 2,048 images
each: half an hour a run, many hours. Every run leaves its curve in a CSV file and its state in a checkpoint, so that
the command can be stopped and given again, and so that several processes, each with some of the `--algorithms` or
`--seeds`, may share one folder. `runs/compare_algorithms` gets `<algorithm>_<seed>.csv`, `table.md`, `curves.png`.
"""

import csv
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import tyro
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DDPOSF, RLOO, RWR, Checkpoints, DenoisingPolicy, DiffusionNFT, evaluate
from agents.algorithm import Algorithm

_POLICY_GRADIENT = {"learning_rate": 1e-3, "step_weights": "inverse_sensitivity"}
_DDPO = {"per_prompt_min_count": 4, "center_advantages": True}
_GROUPS = {"same_noise": True, "advantage_scale": "rollout"}
_FORWARD = {"learning_rate": 1e-4, "noise_draws": 10}
_ALGORITHMS: Mapping[str, tuple[Callable[..., Algorithm], Mapping[str, Any]]] = {
    "DDPO-IS": (DDPOIS, _POLICY_GRADIENT | _DDPO),
    "DDPO-SF": (DDPOSF, _POLICY_GRADIENT | _DDPO),
    "RLOO": (RLOO, _POLICY_GRADIENT | _GROUPS),
    "GRPO": (RLOO, _POLICY_GRADIENT | _GROUPS | {"baseline": "group_mean", "advantage_scale": "group"}),
    "RWR": (RWR, _FORWARD | {"per_prompt": True}),
    "RWR-sparse": (RWR, _FORWARD | {"per_prompt": True, "best_share": 0.25}),
    "NFT": (DiffusionNFT, _FORWARD | {"per_prompt_buffer_size": 8}),
    "DDPO-IS, plain": (DDPOIS, _DDPO | {"optimizer": "adamw", "learning_rate": 2e-4}),
}
"""Each algorithm's class and settings; IS makes two updates of each rollout, the others one. The policy gradients learn
from the first steps alone, with Muon; the last line is the control: all steps, as they are, with AdamW."""


@dataclass
class Args:
    """A comparison of algorithms."""

    algorithms: tuple[str, ...] = tuple(_ALGORITHMS)
    """Which."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings; the held-out seeds are 0, 1, 2 … for all."""
    reward_queries: int = 2_048
    """Images that each run may have judged."""
    eval_every: int = 256
    """Images between two evaluations."""
    num_eval: int = 128
    """Held-out images of an evaluation; a multiple of num_envs."""
    reward: str = "incompressibility"
    """A reward's name."""
    num_envs: int = 64
    """Images drawn together and learnt from."""
    group_size: int = 8
    """Of them, images of one prompt."""
    num_steps: int = 10
    """Denoising steps per image."""
    noisy_steps: int = 4
    """The first of them, which policy gradients make stochastic in training and learn from."""
    quick: bool = False
    """RLOO and RWR with one seed and 512 images."""
    output: Path = Path("runs/compare_algorithms")
    """Where to write."""


def make_algorithm(name: str, env: VectorEnv, seed: int, args: Args) -> Algorithm:
    """Return an untrained run of one of the algorithms."""
    policy = DenoisingPolicy(env.unwrapped.model, mixed_precision="bf16", seed=seed)
    algorithm, own = _ALGORITHMS[name]
    options = {
        "group_size": args.group_size,
        "samples_per_epoch": args.num_envs,
        "prompt_sampling": "round_robin",
        "optimizer": "muon",
        "warmup_updates": 4,
        "seed": seed,
        **own,
    }
    if "step_weights" in own:
        options |= {"sde_window": args.noisy_steps, "sde_window_range": (0, args.noisy_steps)}
    if name.startswith("DDPO-IS"):
        options["batch_size"] = args.num_envs // 2
    return algorithm(policy, env, **options)


def read_curve(file: Path) -> dict[int, np.ndarray]:
    """Return a run's held-out rewards [num_eval] by the number of reward queries before."""
    if not file.exists():
        return {}
    with file.open(newline="") as opened:
        return {int(row[0]): np.array(row[1:], dtype=np.float64) for row in csv.reader(opened)}


def write_curve(file: Path, curve: Mapping[int, np.ndarray]) -> None:
    """Write what `read_curve` reads: whole, or not at all."""
    unfinished = file.with_suffix(".tmp")
    with unfinished.open("w", newline="") as opened:
        csv.writer(opened).writerows(
            [queries, *(f"{one:.4f}" for one in rewards)] for queries, rewards in curve.items()
        )
    unfinished.replace(file)


class Judge(BaseCallback):
    """Adds the held-out rewards to a run's curve, every `eval_every` images."""

    def __init__(self, file: Path, args: Args) -> None:
        super().__init__()
        self.file = file
        self.args = args

    def _on_rollout_start(self) -> None:
        curve, queries = read_curve(self.file), self.model.reward_queries
        if queries % self.args.eval_every or queries in curve:
            return
        result = evaluate(self.model.get_env(), self.model.policy, seeds=range(self.args.num_eval))
        write_curve(self.file, curve | {queries: result.rewards})

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
    return 100 * float(curve[queries].mean() / curve[0].mean() - 1)


def reached(curve: Mapping[int, np.ndarray], per_cent: float) -> str:
    """Return the reward queries after which a gain was seen first."""
    return str(next((queries for queries in sorted(curve) if gain(curve, queries) >= per_cent), "not"))


def summarise(args: Args) -> None:
    """Write the table and the plot of the runs that are there."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    lines = [
        "| algorithm | seeds | reward queries | gain, % | standard error over seeds | +6 % after | +15 % after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in args.algorithms:
        files = [args.output / f"{name}_{seed}.csv" for seed in args.seeds]
        curves = [curve for file in files if len(curve := read_curve(file)) > 1]
        if not curves:
            continue
        queries = sorted(set.intersection(*(set(curve) for curve in curves)))
        gains = np.array([[gain(curve, number) for number in queries] for curve in curves])
        error = gains.std(0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else np.full(len(queries), np.nan)
        axes.errorbar(queries, gains.mean(0), np.nan_to_num(error), label=name, marker=".", capsize=2)
        first = [", ".join(reached(curve, per_cent) for curve in curves) for per_cent in (6.0, 15.0)]
        lines.append(
            f"| {name} | {len(curves)} | {queries[-1]} | {gains.mean(0)[-1]:+.1f} | {error[-1]:.1f} | "
            f"{first[0]} | {first[1]} |"
        )
    axes.set(xlabel="reward queries", ylabel=f"gain in {args.reward} on held-out seeds, %")
    axes.axhline(0, color="gray", lw=0.8)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.output / "curves.png", dpi=150)
    plt.close(figure)
    table = "\n".join(lines)
    (args.output / "table.md").write_text(table + "\n")
    print(table)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.quick:
        args = replace(args, algorithms=("RLOO", "RWR"), seeds=(0,), reward_queries=512, eval_every=128)
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.algorithms:
            run(name, seed, args)
    summarise(args)


if __name__ == "__main__":
    main()
