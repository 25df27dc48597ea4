"""DDPO-IS makes the embedded model's images harder to compress: what `make demo` runs.

    make demo            or            python examples/ddpo_incompressibility.py
    accelerate launch --multi_gpu --num_processes 2 examples/ddpo_incompressibility.py     # on CPUs too

4 to 8 minutes on 2 cores. Prints the reward before and after on held-out seeds, of the prompts of the training (2.49 to
2.70 kB, +8.8 %) and of others (+8.8 %), and writes to `runs/ddpo_incompressibility`:

- `before_after.png`: prompts and seeds that were not trained on, before and after, side by side;
- `model/`: the trained weights in diffusers' format (`unet/`) and the state from which `DDPOIS.load` goes on;
- `tensorboard/`: `tensorboard --logdir runs`.

The whole UNet is trained with two updates per 64 images, of which each eight have one prompt, at 10 denoising steps.
Only the first four are stochastic in training and learnt from, for the others' noise hardly changes a reward. The
training stops when the reward has risen enough, for it can be pressed further than it means anything. Watch the
picture, not the number alone.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import tyro
from gymnasium.vector import VectorEnv
from PIL import Image, ImageDraw
from stable_baselines3.common.callbacks import BaseCallback

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    DenoisingPolicy,
    Evaluation,
    Full,
    LoRA,
    Muon,
    PerPrompt,
    Policy,
    Processes,
    Rollouts,
    Steps,
    Window,
    evaluate,
)
from diffusion_gym.prompts import make_prompts
from diffusion_gym.rewards import to_uint8


@dataclass
class Args:
    """DDPO-IS on the denoising MDP."""

    model: str = "emoji"
    """The name "emoji", a diffusers folder or a Hub id."""
    reward: str = "incompressibility"
    """A reward's name."""
    prompts: str = "simple_animals"
    """A prompt set's name, or a file."""
    reward_queries: int = 1280
    """Images to learn from, at most."""
    target_gain: float = 0.12
    """Stop when the last three rollouts' mean reward, which lags behind the policy's, is this share above the
    pretrained model's: a reward that is pressed further is paid for with the animals."""
    max_minutes: float = 8.0
    """Stop training after this time too."""
    num_envs: int = 64
    """Images drawn together, a share of them by each process; two updates each time."""
    num_steps: int = 10
    """Denoising steps per image."""
    group_size: int = 8
    """Of them, images of one prompt."""
    noisy_steps: int = 4
    """The first of them, which are stochastic in training and learnt from; in the evaluation all are stochastic."""
    learning_rate: float = 1e-3
    """Muon's, after a warm-up over four updates."""
    clip_range: float = 1.6e-3
    """Of the ratio of mean log-probs: the published 1e-4 times 16, for latents of a sixteenth of the size."""
    use_lora: bool = False
    """Train LoRA layers instead of the whole denoiser."""
    precision: Literal["auto", "bf16", "fp16"] | None = "auto"
    """Of the denoiser's arithmetic: "auto" is "bf16" where the device has instructions for it; None that of its
    weights."""
    image_size: int | None = None
    """Height and width in pixels; None: what the model was trained on."""
    device: str = "cpu"
    """A torch device; of many processes each has the one that accelerate gives it."""
    num_eval: int = 128
    """Images before and after, of the training's prompts and of others each; a multiple of num_envs."""
    unseen: str = "emoji_animals"
    """The other prompts: a set's name, or a file; those of the training are left out."""
    seed: int = 0
    """Of the training; the evaluations' seeds are 0, 1, 2 …, which no training uses."""
    output: Path = Path("runs/ddpo_incompressibility")
    """Where to write."""


class StopEarly(BaseCallback):
    """Ends the training when the mean reward of the last three rollouts has reached a target, or time is up."""

    def __init__(self, target: float, *, max_minutes: float) -> None:
        super().__init__()
        self.target = target
        self.deadline = time.monotonic() + 60 * max_minutes
        self.means: list[float] = []

    def _on_rollout_end(self) -> None:
        self.means.append(float(self.locals["returns"].mean()))

    def _on_step(self) -> bool:
        reached = len(self.means) >= 3 and sum(self.means[-3:]) / 3 >= self.target
        return not reached and time.monotonic() < self.deadline


def judge(env: VectorEnv, policy: Policy, sets: Mapping[str, Sequence[str]], num_eval: int) -> dict[str, Evaluation]:
    """Return the evaluation of each set of prompts, all on the seeds 0, 1, 2 …, which have its prompts in turn."""
    return {
        name: evaluate(env, policy, seeds=range(num_eval), prompts=[texts[k % len(texts)] for k in range(num_eval)])
        for name, texts in sets.items()
    }


def draw_before_after(
    before: Evaluation, after: Evaluation, file: Path, *, num_pairs: int = 24, unit: str = "kB"
) -> None:
    """Write pairs of images, before | after, with prompt and reward above each."""
    columns, size, gap, header = 6, 112, 14, 34
    num_pairs = min(num_pairs, len(before.images))
    rows = -(-num_pairs // columns)
    pair = 2 * size + 2
    canvas = Image.new("RGB", (columns * (pair + gap) + gap, rows * (size + header + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    pixels = [to_uint8(evaluation.images[:num_pairs]).numpy() for evaluation in (before, after)]
    for index in range(num_pairs):
        row, column = divmod(index, columns)
        x, y = gap + column * (pair + gap), gap + row * (size + header + gap)
        draw.text((x, y), before.prompts[index], "black", font_size=15)
        for side, evaluation in enumerate((before, after)):
            left = x + side * (size + 2)
            draw.text((left, y + 17), f"{evaluation.rewards[index]:.2f} {unit}", "gray", font_size=13)
            canvas.paste(Image.fromarray(pixels[side][index]).resize((size, size)), (left, y + header))
    canvas.save(file)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    started = time.monotonic()
    processes = Processes()
    env = gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=args.num_envs // processes.count,
        model=args.model,
        reward=args.reward,
        prompts=args.prompts,
        num_steps=args.num_steps,
        image_size=args.image_size,
        device=processes.device or args.device,
    )
    adaptation = LoRA() if args.use_lora else Full()
    policy = DenoisingPolicy(env.unwrapped.model, adaptation=adaptation, precision=args.precision, seed=args.seed)
    algorithm = DDPOIS(
        policy,
        env,
        learning_rate=args.learning_rate,
        batch_size=args.num_envs // 2,
        clip_range=args.clip_range,
        optimizer=Muon(warmup_updates=4),
        rollouts=Rollouts(samples=args.num_envs, group_size=args.group_size, prompt_sampling="round_robin"),
        advantages=PerPrompt(16, min_count=4, center=True),
        steps=Steps(weights="inverse_sensitivity", window=Window(args.noisy_steps, within=(0, args.noisy_steps))),
        tensorboard_log=str(args.output / "tensorboard"),
        seed=args.seed,
    )
    unit = env.unwrapped.reward.unit
    trained_on = env.unwrapped.prompts.texts
    unseen = f"{args.unseen}, not trained on"
    sets = {
        "prompts of the training": trained_on,
        unseen: [text for text in make_prompts(args.unseen) if text not in trained_on],
    }
    before = judge(env, policy, sets, args.num_eval)
    if processes.is_main:
        for name, one in before.items():
            print(f"before: {one.mean:.3f} ± {one.standard_error:.3f} {unit} on {name}, held-out seeds", flush=True)
    first = next(iter(before.values())).mean
    stop = StopEarly(first + args.target_gain * abs(first), max_minutes=args.max_minutes)
    algorithm.learn(args.reward_queries * args.num_steps, callback=stop, progress_bar=True)
    after = judge(env, policy, sets, args.num_eval)
    algorithm.save(args.output / "model")
    if not processes.is_main:
        return
    print(f"after {algorithm.reward_queries} reward queries, errors over prompts and of this one policy:")
    for name, one in after.items():
        gain, error = one.gain_over(before[name])
        print(
            f"after:  {one.mean:.3f} ± {one.standard_error:.3f} {unit} on {name}; paired difference: "
            f"{gain:+.3f} ± {error:.3f} {unit} = {100 * gain / abs(before[name].mean):+.1f} %, "
            f"{gain / error:.1f} standard errors"
        )
    draw_before_after(before[unseen], after[unseen], args.output / "before_after.png")
    print(f"{args.output}: before_after.png, model/, tensorboard/; {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
