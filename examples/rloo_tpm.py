"""RLOO teaches a time predictor to draw the same images in fewer steps.

    python examples/rloo_tpm.py

15 to 26 minutes on 2 cores. The frozen embedded model denoises; a small head looks at its features and chooses the next
diffusion time (TPDM). It is trained on 30 animals to come near the 80-step image from the same noise, at a price for
every network call. A context-free schedule (one Beta per step, blind to the image) is trained in the same way; both
start from Karras' grid. They take their modes, at several paces (every ratio r becomes r^(1/pace)), and are held
against fixed grids on 15 other animals and held-out seeds: distance over network calls, the same noises for all.

The time predictor comes nearer than the best fixed grid with as many calls: by 6 % at 8 calls, 9 % at 11 and 2 % at 14
(2.7, 1.7 and 0.5 standard errors over the 15 animals, of one training), and it needs 13.4 calls for what uniform steps
reach with 20, Karras' grid 14.0. It is the shape of the schedule that it learns: in this time all images get the same
number of calls. `runs/rloo_tpm` gets:

- `quality.png`: the trade-off; `times.png`: how many calls each animal gets, and where; `path.png`: one sample's path;
- `time_predictor/`, `context_free/`: the trained policies, for `agents.policies.load_policy`; `tensorboard/`.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import tyro
from gymnasium.vector import VectorActionWrapper, VectorEnv
from PIL import Image, ImageDraw
from scipy.stats import spearmanr
from torch import Tensor

import diffusion_gym  # noqa: F401
from agents import (
    RLOO,
    ContextFreeSchedule,
    FixedSchedule,
    Groups,
    Policy,
    Rollouts,
    TimePredictor,
    collect,
    evaluate,
)
from agents.evaluation import standard_error
from diffusion_gym.envs.reference import ReferenceDistance
from diffusion_gym.grids import karras_grid, power_grid, shifted_grid, step_ratios, uniform_grid
from diffusion_gym.models import DiffusionModel, load_model
from diffusion_gym.precision import has_fast_bf16
from diffusion_gym.prompts import make_prompts
from diffusion_gym.rewards import make_reward

GRIDS = {
    "uniform": uniform_grid,
    "t^0.7": partial(power_grid, rho=0.7),
    "shifted 1.5": partial(shifted_grid, shift=1.5),
    "shifted 3": shifted_grid,
    "Karras": karras_grid,
}
TIME_PREDICTOR, CONTEXT_FREE = "time predictor", "context-free"


@dataclass
class Args:
    """RLOO on the time-prediction MDP."""

    model: str = "emoji"
    """A model's name, a diffusers folder, or a Hub id."""
    image_size: int | None = None
    """Height and width in pixels; None: what the model was trained on."""
    device: str = "cpu"
    """A torch device."""
    timesteps: int = 24_000
    """Network calls that the time predictor learns from."""
    context_free_timesteps: int = 12_000
    """Network calls that the context-free schedule learns from."""
    guidance_scale: float | None = 2.0
    """Of the frozen model: at 2 more steps of "emoji" pay most; None: the model's own."""
    num_envs: int = 64
    """Images drawn together."""
    samples_per_epoch: int = 256
    """Images for each rollout; a multiple of num_envs."""
    group_size: int = 8
    """Of them, paths from one prompt and one noise."""
    num_starts: int = 96
    """Prompts with noises to train on; each costs one 80-step reference."""
    n_epochs: int = 2
    """Updates for each rollout."""
    learning_rate: float = 3e-3
    """AdamW's."""
    context_free_learning_rate: float = 0.03
    """AdamW's, for the context-free schedule."""
    step_cost_weight: float = 4e-3
    """The price of a network call, in root mean squared error of the image."""
    initial_grid: Literal["uniform", "t^0.7", "shifted 1.5", "shifted 3", "Karras"] = "Karras"
    """The grid that both start from; "shifted 3" is Stable Diffusion 3's, for flow models."""
    initial_steps: int = 12
    """Its steps."""
    initial_concentration: float = 30.0
    """α + β of the Betas, before training."""
    max_steps: int = 28
    """The most network calls of an image."""
    paces: tuple[float, ...] = (0.7, 1.0, 1.4)
    """The learned schedules are judged at these: with roughly so many times their steps."""
    grid_steps: tuple[int, ...] = (5, 8, 10, 15, 20, 28)
    """Lengths of the fixed grids."""
    uniform_steps: int = 20
    """The schedules are asked with how many calls they reach what so many uniform steps do."""
    num_eval: int = 64
    """Held-out images; a multiple of num_envs."""
    seed: int = 0
    """Of the training; the held-out seeds are 0, 1, 2 …"""
    output: Path = Path("runs/rloo_tpm")
    """Where to write."""

    def __post_init__(self) -> None:
        longest = max(self.initial_steps, self.uniform_steps, *self.grid_steps)
        if longest > self.max_steps or 1.0 not in self.paces:
            raise ValueError(
                f"max_steps must be at least {longest}, which a grid has, and 1.0 among the paces; got "
                f"{self.max_steps} and {self.paces}"
            )


class Paced(VectorActionWrapper):
    """Takes about `pace` times as many steps along the same schedule: each covers 1/pace of the way in log τ."""

    def __init__(self, env: VectorEnv, pace: float) -> None:
        super().__init__(env)
        self.pace = pace

    def actions(self, actions: Tensor) -> Tensor:
        """Return r^(1/pace)."""
        return actions ** (1 / self.pace)


@dataclass(frozen=True)
class Played:
    """One held-out image per seed.

    Args:
        distances: [N] root mean squared error to the 80-step image.
        nfe: [N] network calls.
        alignment: [N] the image-text scorer's opinion.
        prompts: The N prompts.
    """

    distances: np.ndarray
    nfe: np.ndarray
    alignment: np.ndarray
    prompts: Sequence[str]

    @property
    def errors(self) -> np.ndarray:
        """[N] mean squared errors."""
        return self.distances**2

    def __str__(self) -> str:
        return (
            f"{self.nfe.mean():5.2f} calls   distance {self.mean_of(self.distances)}   "
            f"error {self.mean_of(self.errors)}   alignment {self.mean_of(self.alignment)}"
        )

    def error_of(self, values: np.ndarray) -> float:
        """Return the standard error of the mean of [N] values, over prompts."""
        return standard_error(values, self.prompts)

    def mean_of(self, values: np.ndarray, sign: str = "") -> str:
        """Return the mean of [N] values with its error, as text."""
        return f"{values.mean():{sign}.5f} ± {self.error_of(values):.5f}"


def play(env: VectorEnv, policy: Policy, prompts: Sequence[str], *, pace: float = 1.0) -> Played:
    """Return one image per prompt, from the seeds 0, 1, 2 …, by the policy's modes."""
    seeds = range(len(prompts))
    result = evaluate(
        Paced(env, pace), policy, seeds=seeds, prompts=prompts, deterministic=True, max_images=len(prompts)
    )
    alignment = make_reward("emoji_alignment")(result.images, prompts).values.numpy()
    return Played(-result.rewards, result.lengths, alignment, prompts)


def visited_times(env: VectorEnv, policy: Policy, prompts: Sequence[str]) -> list[np.ndarray]:
    """Return the times at which the network is called for one image per lane, from the seeds 0, 1, 2 and so on."""
    texts = list(prompts[: env.num_envs])
    rollout = collect(env, policy, seeds=[list(range(env.num_envs))], options={"prompt": texts}, deterministic=True)
    times = rollout.changing["timestep"][:, :, 0].T.numpy()
    return [row[:length] for row, length in zip(times, rollout.lengths, strict=True)]


def fixed_schedule(env: VectorEnv, name: str, num_steps: int) -> FixedSchedule:
    """Return the policy that walks a grid."""
    schedule = env.unwrapped.model.schedule
    return FixedSchedule(step_ratios(schedule, GRIDS[name](schedule, num_steps)), max_steps=env.unwrapped.max_steps)


class FixedGrids:
    """The fixed grids' samples at any number of steps, drawn when they are asked for."""

    def __init__(self, env: VectorEnv, prompts: Sequence[str]) -> None:
        self.env = env
        self.prompts = prompts
        self._known: dict[tuple[str, int], Played] = {}

    def at(self, name: str, num_steps: int) -> Played:
        """Return a grid's samples."""
        if (name, num_steps) not in self._known:
            self._known[name, num_steps] = play(self.env, fixed_schedule(self.env, name, num_steps), self.prompts)
        return self._known[name, num_steps]

    def distances_at(self, name: str, calls: float) -> np.ndarray:
        """Return each sample's distance at a mean number of calls: between the two lengths that are next to it."""
        low, weight = int(calls), calls - int(calls)
        below = self.at(name, low).distances
        return (1 - weight) * below + weight * self.at(name, low + 1).distances if weight else below


def make_env(model: DiffusionModel, reward: ReferenceDistance, args: Args, **arguments: Any) -> VectorEnv:
    """Return the environment; all share the reward, which remembers the 80-step images."""
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


def train(policy: Policy, env: VectorEnv, args: Args, *, timesteps: int, learning_rate: float) -> None:
    """Train a policy of times."""
    algorithm = RLOO(
        policy,
        env,
        learning_rate=learning_rate,
        n_epochs=args.n_epochs,
        rollouts=Rollouts(
            samples=args.samples_per_epoch,
            group_size=args.group_size,
            same_noise=True,
            num_starts=args.num_starts,
        ),
        advantages=Groups(scale="rollout"),
        tensorboard_log=str(args.output / "tensorboard"),
        seed=args.seed,
    )
    algorithm.learn(timesteps, tb_log_name=type(policy).__name__, progress_bar=True)


def split_prompts() -> tuple[list[str], list[str]]:
    """Return the animals to train on and those held out."""
    prompts = list(make_prompts("simple_animals"))
    return [p for k, p in enumerate(prompts) if k % 3], prompts[::3]


def interpolated(curve: Sequence[Played], quantity: str, calls: float) -> float:
    """Return the mean of a quantity at a mean number of calls, between the points of a curve (log-log)."""
    nfe, means = zip(*((played.nfe.mean(), getattr(played, quantity).mean()) for played in curve), strict=True)
    return float(np.exp(np.interp(np.log(calls), np.log(nfe), np.log(means))))


def compare(learned: Mapping[str, Sequence[Played]], fixed: Mapping[str, Sequence[Played]], grids: FixedGrids) -> None:
    """Print the paired differences of the learned schedules to the best fixed grid at the same mean number of calls."""
    for label, curve in learned.items():
        for played in curve:
            calls = float(played.nfe.mean())
            name = min(fixed, key=lambda name: interpolated(fixed[name], "distances", calls))
            other = grids.distances_at(name, calls)
            for quantity, theirs, ours in (
                ("distance", other, played.distances),
                ("error", other**2, played.errors),
            ):
                difference = theirs - ours
                print(
                    f"{label} against {name} at {calls:.2f} calls: {quantity} {ours.mean() / theirs.mean() - 1:+.0%}, "
                    f"better by {played.mean_of(difference, sign='+')} "
                    f"({difference.mean() / played.error_of(difference):+.1f} standard errors of the paired difference)"
                )


def calls_for(curve: Sequence[Played], distance: float) -> str:
    """Return the mean number of calls at which a curve reaches a distance, between its points (log-linear)."""
    distances, calls = zip(*sorted((float(p.distances.mean()), float(p.nfe.mean())) for p in curve), strict=True)
    if distance > distances[-1]:
        return f"fewer than {calls[-1]:.1f}"
    if distance < distances[0]:
        return f"more than {calls[0]:.1f}"
    return f"{np.interp(np.log(distance), np.log(distances), calls):.1f}"


def draw_quality(fixed: Mapping[str, Sequence[Played]], learned: Mapping[str, Sequence[Played]], file: Path) -> None:
    """Write the error over the mean number of calls."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, curve in {**fixed, **learned}.items():
        style = {"lw": 2.2, "marker": "o"} if label in learned else {"lw": 1.0, "marker": ".", "ls": "--"}
        ordered = sorted(curve, key=lambda played: played.nfe.mean())
        axes.errorbar(
            [played.nfe.mean() for played in ordered],
            [played.distances.mean() for played in ordered],
            [played.error_of(played.distances) for played in ordered],
            label=label,
            capsize=2,
            **style,
        )
    axes.set(yscale="log", xlabel="mean network calls per image", ylabel="distance to the 80-step image (RMSE)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_times(times: Sequence[np.ndarray], prompts: Sequence[str], file: Path) -> None:
    """Write at which times the denoiser is called, a row for each animal, the one with the fewest calls on top."""
    by_prompt = defaultdict(list)
    for row, prompt in zip(times, prompts, strict=False):
        by_prompt[prompt].append(len(row))
    calls = {prompt: np.mean(lengths) for prompt, lengths in by_prompt.items()}
    ordered = sorted(calls, key=calls.__getitem__)
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(ordered) + 1.2), layout="constrained")
    for row, prompt in zip(times, prompts, strict=False):
        axes.plot(row, [ordered.index(prompt)] * len(row), "|", ms=11, color="tab:blue", alpha=0.35)
    axes.set_yticks(range(len(ordered)), [f"{prompt}  ({calls[prompt]:.1f} calls)" for prompt in ordered])
    axes.set(xlabel="diffusion time t", ylim=(len(ordered) - 0.5, -0.5))
    axes.invert_xaxis()
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_path(policies: Mapping[str, Policy], model: DiffusionModel, prompt: str, args: Args, file: Path) -> None:
    """Write what x_t looks like after every call, a row for each policy; the last picture of a row is its image."""
    env = gym.make_vec(
        "TimePredictionMDP-v0",
        model=model,
        max_steps=args.max_steps,
        guidance_scale=args.guidance_scale,
        autoreset_mode="DISABLED",
        render_mode="rgb_array",
    )
    rows = {}
    for label, policy in policies.items():
        observation, info = env.reset(seed=0, options={"prompt": prompt})
        frames = []
        while not info["ended"].all():
            frames.append((f"t = {float(observation['timestep']):.0f}", env.render()[0]))
            observation, *_, info = env.step(policy.act(observation, deterministic=True))
        frames.append((f"{len(frames)} calls", env.render()[0]))
        rows[label] = frames
    size, gap, header = 96, 4, 18
    columns = max(len(frames) for frames in rows.values())
    canvas = Image.new("RGB", (columns * (size + gap) + gap, len(rows) * (size + 2 * header + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (label, frames) in enumerate(rows.items()):
        y = row * (size + 2 * header + gap)
        draw.text((gap, y), f"{label}: {prompt}", "black", font_size=14)
        for column, (caption, frame) in enumerate(frames):
            x = gap + column * (size + gap)
            draw.text((x, y + header), caption, "gray", font_size=12)
            canvas.paste(Image.fromarray(frame).resize((size, size)), (x, y + 2 * header))
    canvas.save(file)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    started = time.monotonic()
    args.output.mkdir(parents=True, exist_ok=True)
    dtype = "bfloat16" if has_fast_bf16(args.device) else "float32"
    model = load_model(args.model, device=args.device, dtype=dtype, image_size=args.image_size)

    reward = ReferenceDistance(guidance_scale=args.guidance_scale, root=True)
    train_prompts, held_out = split_prompts()
    env = make_env(
        model, reward, args, prompts=train_prompts, step_cost="linear", step_cost_weight=args.step_cost_weight
    )
    grid = GRIDS[args.initial_grid](model.schedule, args.initial_steps)
    ratios = step_ratios(model.schedule, grid).tolist()
    first = {"initial_concentration": args.initial_concentration, "seed": args.seed}
    policies: dict[str, Policy] = {
        CONTEXT_FREE: ContextFreeSchedule(ratios + [ratios[-1]] * (args.max_steps - args.initial_steps), **first),
        TIME_PREDICTOR: TimePredictor(
            env.single_observation_space, initial_ratio=dict(zip(grid[:-1].tolist(), ratios, strict=True)), **first
        ),
    }
    for label, timesteps, rate in (
        (CONTEXT_FREE, args.context_free_timesteps, args.context_free_learning_rate),
        (TIME_PREDICTOR, args.timesteps, args.learning_rate),
    ):
        train(policies[label], env, args, timesteps=timesteps, learning_rate=rate)
        folder = args.output / label.replace(" ", "_").replace("-", "_")
        folder.mkdir(exist_ok=True)
        policies[label].save(folder)
        print(f"{label} trained, {(time.monotonic() - started) / 60:.1f} minutes", flush=True)

    prompts = [held_out[k % len(held_out)] for k in range(args.num_eval)]
    env = make_env(model, reward, args)
    grids = FixedGrids(env, prompts)
    fixed = {name: [grids.at(name, num_steps) for num_steps in args.grid_steps] for name in GRIDS}
    learned = {
        label: [play(env, policy, prompts, pace=pace) for pace in args.paces] for label, policy in policies.items()
    }
    for label, curve in {**fixed, **learned}.items():
        for played in curve:
            print(f"{label:>15}  {played}")
    compare(learned, fixed, grids)
    uniform = float(grids.at("uniform", args.uniform_steps).distances.mean())
    for label, curve in {**fixed, **learned}.items():
        print(f"{label}: {calls_for(curve, uniform)} calls for what uniform steps reach with {args.uniform_steps}")

    predicted = learned[TIME_PREDICTOR][args.paces.index(1.0)]
    difficulty = grids.at(args.initial_grid, args.initial_steps).distances
    correlation = spearmanr(predicted.nfe, difficulty).statistic if predicted.nfe.std() else 0.0
    print(
        f"calls of the time predictor: {predicted.nfe.min()} to {predicted.nfe.max()}, standard deviation "
        f"{predicted.nfe.std():.2f}; rank correlation with the first grid's distance {correlation:+.2f}"
    )
    draw_quality(fixed, learned, args.output / "quality.png")
    times = visited_times(env, policies[TIME_PREDICTOR], prompts)
    draw_times(times, prompts, args.output / "times.png")
    shown = {
        TIME_PREDICTOR: policies[TIME_PREDICTOR],
        "uniform": fixed_schedule(env, "uniform", len(times[0])),
    }
    draw_path(shown, model, prompts[0], args, args.output / "path.png")
    print(f"{args.output}: quality.png, times.png, path.png; {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
