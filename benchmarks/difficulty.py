"""Whether a time predictor spends more network calls on harder images.

    python benchmarks/difficulty.py

About 20 minutes of one core. Each candidate prompt's difficulty is measured first: the distance of a short fixed grid's
images to the 80-step images from the same noises. Every other one of the easiest and of the hardest prompts is trained
on (RLOO, TPDM's algorithm, at a price for each call); for the rest of these, on new noises, the rank correlation of
difficulty and calls is printed, over prompts and over images, with its bootstrap interval. `--output` gets
`difficulty.json` and `difficulty.png`.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import tyro
from gymnasium.vector import VectorEnv
from scipy import stats

import diffusion_gym  # noqa: F401
from agents import RLOO, AdamW, FixedSchedule, Groups, Policy, Rollouts, TimePredictor, evaluate
from diffusion_gym.envs.reference import ReferenceDistance
from diffusion_gym.grids import karras_grid, shifted_grid, step_ratios
from diffusion_gym.models import DiffusionModel, load_model
from diffusion_gym.precision import has_fast_bf16
from diffusion_gym.prompts import make_prompts

GRIDS = {"shifted": shifted_grid, "Karras": karras_grid}


@dataclass
class Args:
    """Difficulty and calls."""

    model: str = "emoji_flow"
    """A model."""
    prompts: tuple[str, ...] = ("simple_animals", "emoji_objects", "emoji_backgrounds")
    """The sets of candidates."""
    max_prompts: int = 72
    """Candidates, drawn with a fixed seed."""
    extremes: int = 18
    """So many of the easiest and of the hardest are kept; half of them are trained on."""
    noises: int = 4
    """Noises for each candidate's difficulty."""
    grid: str = "shifted"
    """The fixed grid, "shifted" or "Karras", from which the predictor starts too."""
    grid_steps: int = 10
    """Its steps."""
    guidance_scale: float | None = None
    """None: the model's."""
    step_cost_weight: float = 2e-3
    """The price of a call."""
    timesteps: int = 48_000
    """Calls to learn from."""
    samples: int = 128
    """Images for each rollout."""
    num_starts: int = 144
    """Prompts with noises to train on; each costs an 80-step reference."""
    learning_rate: float = 3e-3
    """AdamW's."""
    eval_noises: int = 8
    """New noises of each held-out prompt."""
    num_envs: int = 64
    """Images drawn together."""
    max_steps: int = 40
    """The most calls."""
    seed: int = 0
    """Of the training."""
    output: Path = Path("runs/difficulty")
    """Where to write."""


def make_env(model: DiffusionModel, reward: ReferenceDistance, args: Args, **arguments: object) -> VectorEnv:
    """Return the environment."""
    return gym.make_vec(
        "TimePredictionMDP-v0",
        num_envs=args.num_envs,
        model=model,
        reward=reward,
        max_steps=args.max_steps,
        guidance_scale=args.guidance_scale,
        autoreset_mode="DISABLED",
        **arguments,
    )


def played(env: VectorEnv, policy: Policy, prompts: Sequence[str], noises: int, first: int) -> np.ndarray:
    """Return the distances to the 80-step images and the calls, [2, prompts, noises], from the seeds `first` on."""
    texts = [prompt for prompt in prompts for _ in range(noises)]
    padded = texts + [texts[0]] * (-len(texts) % env.num_envs)
    seeds = range(first, first + len(padded))
    result = evaluate(env, policy, seeds=seeds, prompts=padded, deterministic=True)
    both = np.stack([-result.rewards, result.lengths])[:, : len(texts)]
    return both.reshape(2, len(prompts), noises)


def correlation(difficulty: np.ndarray, calls: np.ndarray) -> tuple[float, float, float]:
    """Return Spearman's rank correlation of [N] values with its 95 % bootstrap interval."""
    if not np.ptp(calls):
        return 0.0, 0.0, 0.0

    def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
        return float(stats.spearmanr(x, y).statistic) if np.ptp(y) else 0.0

    bounds = stats.bootstrap(
        (difficulty, calls),
        rank_correlation,
        paired=True,
        vectorized=False,
        n_resamples=1999,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return rank_correlation(difficulty, calls), float(bounds.low), float(bounds.high)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    started = time.process_time()
    args.output.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model, dtype="bfloat16" if has_fast_bf16("cpu") else "float32")
    candidates = list(dict.fromkeys(prompt for name in args.prompts for prompt in make_prompts(name)))
    candidates = np.random.default_rng(0).permutation(candidates)[: args.max_prompts].tolist()
    reward = ReferenceDistance(guidance_scale=args.guidance_scale, root=True)
    judge = make_env(model, reward, args)
    grid = GRIDS[args.grid](model.schedule, args.grid_steps)
    ratios = step_ratios(model.schedule, grid)
    fixed = FixedSchedule(ratios, max_steps=args.max_steps)

    difficulty = played(judge, fixed, candidates, args.noises, 0)[0].mean(1)
    order = difficulty.argsort()
    kept = [candidates[row] for row in (*order[: args.extremes], *order[-args.extremes :])]
    trained, held_out = kept[::2], kept[1::2]
    print(f"difficulty {difficulty.min():.3f} to {difficulty.max():.3f}; easiest {kept[:3]}, hardest {kept[-3:]}")

    env = make_env(model, reward, args, prompts=trained, step_cost="linear", step_cost_weight=args.step_cost_weight)
    predictor = TimePredictor(
        env.single_observation_space,
        initial_ratio=dict(zip(grid[:-1].tolist(), ratios.tolist(), strict=True)),
        initial_concentration=30.0,
        seed=args.seed,
    )
    algorithm = RLOO(
        predictor,
        env,
        learning_rate=args.learning_rate,
        n_epochs=2,
        optimizer=AdamW(weight_decay=0.0),
        rollouts=Rollouts(samples=args.samples, group_size=8, same_noise=True, num_starts=args.num_starts),
        advantages=Groups(scale="rollout"),
        tensorboard_log=str(args.output / "tensorboard"),
        seed=args.seed,
    )
    algorithm.learn(args.timesteps, progress_bar=True)
    predictor.save(args.output / "time_predictor")

    new = 1_000_000
    hard = played(judge, fixed, held_out, args.eval_noises, new)[0]
    reached, calls = played(judge, predictor, held_out, args.eval_noises, new)
    by_prompt = correlation(hard.mean(1), calls.mean(1))
    by_image = correlation(hard.ravel(), calls.ravel())
    print(f"held-out prompts: calls {calls.min():.0f} to {calls.max():.0f}, mean {calls.mean():.2f}")
    for name, (middle, low, high) in (("prompts", by_prompt), ("images", by_image)):
        print(f"rank correlation of difficulty and calls over {name}: {middle:+.2f} ({low:+.2f} to {high:+.2f})")
    print(f"{(time.process_time() - started) / 60:.1f} CPU minutes")
    rows = zip(held_out, hard.mean(1).tolist(), calls.mean(1).tolist(), reached.mean(1).tolist(), strict=True)
    table = [dict(zip(("prompt", "difficulty", "calls", "distance"), row, strict=True)) for row in rows]
    result = {"by_prompt": by_prompt, "by_image": by_image, "prompts": table}
    (args.output / "difficulty.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.errorbar(
        hard.mean(1),
        calls.mean(1),
        calls.std(1) / args.eval_noises**0.5,
        hard.std(1) / args.eval_noises**0.5,
        fmt="o",
        ms=4,
        capsize=2,
    )
    axes.set(
        xscale="log",
        xlabel=f"distance of {args.grid_steps} fixed steps to the 80-step image (RMSE): difficulty",
        ylabel="calls of the time predictor",
        title=f"held-out prompts, rank correlation {by_prompt[0]:+.2f} ({by_prompt[1]:+.2f} to {by_prompt[2]:+.2f})",
    )
    figure.savefig(args.output / "difficulty.png", dpi=150)


if __name__ == "__main__":
    main()
