"""RLOO and GRPO on a flow model, with noise by FlowSDE, by CPS and by DDIM: reward over reward queries.

    python benchmarks/flow_samplers.py

An hour and a half of one core: two algorithms, three samplers, three seeds, 384 images each. The first four of ten
steps are noisy in training and learnt from; as in Flow-GRPO, held-out images are drawn without noise, so that all start
from the same number. Beside the reward that is trained for stands one that is not, emoji_alignment. Each run leaves a
CSV file in `--output`, and is not done again where that is whole; `table.md` and `curves.png` come of all that are.
"""

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import tyro

import diffusion_gym  # noqa: F401
from agents import GRPO, RLOO, Algorithm, DenoisingPolicy, Groups, Muon, Rollouts, Steps, Window, evaluate
from agents.evaluation import standard_error
from diffusion_gym.models import load_model
from diffusion_gym.rewards import make_reward
from diffusion_gym.samplers import CPS, DDIM, FlowSDE

SAMPLERS = {"FlowSDE(0.7)": FlowSDE(0.7), "CPS(0.7)": CPS(0.7), "DDIM(1.0)": DDIM(1.0)}
ALGORITHMS = {"RLOO": (RLOO, Groups(scale="rollout")), "GRPO": (GRPO, Groups("group_mean", scale="group"))}
LANES, STEPS, NOISY = 64, 10, 4


@dataclass
class Args:
    """RLOO and GRPO with each sampler."""

    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    """Which."""
    samplers: tuple[str, ...] = tuple(SAMPLERS)
    """Which."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings; the held-out images' are 0, 1, 2 …"""
    model: str = "emoji_flow"
    """A flow model."""
    updates: int = 6
    """Of 64 images each."""
    eval_every: int = 3
    """Updates between evaluations."""
    num_eval: int = 128
    """Held-out images."""
    learning_rate: float = 1e-3
    """Muon's."""
    output: Path = Path("runs/flow_samplers")
    """Where to write."""


def make_algorithm(name: str, sampler: str, seed: int, args: Args) -> Algorithm:
    """Return an untrained run."""
    env = gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=LANES,
        model=load_model(args.model),
        num_steps=STEPS,
        reward="incompressibility",
        autoreset_mode="DISABLED",
    )
    algorithm, advantages = ALGORITHMS[name]
    return algorithm(
        DenoisingPolicy(env.unwrapped.model, sampler=SAMPLERS[sampler], precision="auto", seed=seed),
        env,
        learning_rate=args.learning_rate,
        optimizer=Muon(warmup_updates=4),
        rollouts=Rollouts(group_size=8, same_noise=True, prompt_sampling="round_robin"),
        advantages=advantages,
        steps=Steps(weights="inverse_sensitivity", window=Window(NOISY, within=(0, NOISY))),
        seed=seed,
    )


def judged(algorithm: Algorithm, num_eval: int) -> tuple[np.ndarray, list[str]]:
    """Return both rewards [2, num_eval] of held-out images that are drawn without noise, and their prompts."""
    env = algorithm.get_env()
    result = evaluate(env, algorithm.policy, seeds=range(num_eval), max_images=num_eval, deterministic=True)
    metadata = env.unwrapped.prompts.metadata_of(result.prompts)
    other = make_reward("emoji_alignment")(result.images, result.prompts, metadata).values.numpy()
    return np.stack([result.rewards, other]), list(result.prompts)


def run(name: str, sampler: str, seed: int, args: Args, file: Path) -> None:
    """Train once and write the curve: a row per evaluation, of queries, CPU seconds of training and the means."""
    algorithm = make_algorithm(name, sampler, seed, args)
    rows, seconds, first = [], 0.0, None
    for update in range(0, args.updates + 1, args.eval_every):
        if update:
            started = time.process_time()
            algorithm.learn(args.eval_every * LANES * STEPS, log_interval=0, reset_num_timesteps=False)
            seconds += time.process_time() - started
        rewards, prompts = judged(algorithm, args.num_eval)
        first = rewards if first is None else first
        errors = [standard_error(values, prompts) for values in rewards - first]
        rows.append([algorithm.reward_queries, round(seconds, 1), *rewards.mean(1).round(4), *np.round(errors, 4)])
        print(name, sampler, seed, *rows[-1], sep="  ", flush=True)
    unfinished = file.with_suffix(".tmp")
    with unfinished.open("w", newline="") as opened:
        csv.writer(opened).writerows(rows)
    unfinished.replace(file)


def summarise(curves: dict[tuple[str, str], np.ndarray], folder: Path) -> None:
    """Write the table and the curves of [seeds, evaluations, columns] each."""
    lines = ["| algorithm | noise | queries | incompressibility, kB | gain by seed | emoji_alignment | CPU s |"]
    lines.append("|---|---|---|---|---|---|---|")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, sampler), runs in curves.items():
        style = {"ls": "-" if name == "RLOO" else "--", "color": f"C{list(SAMPLERS).index(sampler)}"}
        for axis, column in zip(axes, (2, 3), strict=True):
            values = runs[:, :, column]
            spread = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0 * values[0]
            axis.errorbar(runs[0, :, 0], values.mean(0), spread, capsize=2, label=f"{name}, {sampler}", **style)
        last, start = runs[:, -1], runs[:, 0]
        gains = ", ".join(f"{100 * gain:+.1f} %" for gain in last[:, 2] / start[:, 2] - 1)
        lines.append(
            f"| {name} | {sampler} | {last[0, 0]:.0f} | {start[:, 2].mean():.3f} → {last[:, 2].mean():.3f} | {gains} | "
            f"{start[:, 3].mean():.3f} → {last[:, 3].mean():.3f} | {last[:, 1].mean():.0f} |"
        )
    axes[0].set(xlabel="reward queries", ylabel="incompressibility (kB), trained for")
    axes[1].set(xlabel="reward queries", ylabel="emoji_alignment, not trained for")
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "curves.png", dpi=150)
    plt.close(figure)
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def read(files: Sequence[Path]) -> np.ndarray:
    """Return curves as [files, evaluations, columns]."""
    return np.stack([np.loadtxt(file, delimiter=",") for file in files])


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    args.output.mkdir(parents=True, exist_ok=True)
    curves: dict[tuple[str, str], list[Path]] = {}
    for seed in args.seeds:
        for name in args.algorithms:
            for sampler in args.samplers:
                file = args.output / f"{name}_{sampler}_{seed}.csv"
                if not file.exists():
                    run(name, sampler, seed, args, file)
                curves.setdefault((name, sampler), []).append(file)
    summarise({key: read(files) for key, files in curves.items()}, args.output)


if __name__ == "__main__":
    main()
