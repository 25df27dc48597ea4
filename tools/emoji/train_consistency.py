"""Distil `emoji_consistency`, a latent consistency model of few steps, from `emoji`.

    OMP_NUM_THREADS=1 python -m tools.emoji.train_consistency

In two stages: f is regressed on the ends of the teacher's trajectories, then distilled (guidance 4 folded in, steps of
50 indices). It writes `build/emoji/consistency/distillation/pipeline`, a folder for `tools.emoji.export`, and grids of
samples. Killed and started again with the same command it goes on from its last checkpoint.

The student keeps the teacher's ε-prediction, and starts at index 799 of 1,000: x̂_0 = (x − σ·ε̂)/α multiplies errors by
12 there, by 66 at 999.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from stable_baselines3.common.callbacks import BaseCallback

from agents.callbacks import SampleGrid
from agents.consistency import (
    Averaged,
    ConsistencyDistillation,
    Euler,
    EveryIndex,
    FixedGuidance,
    Latents,
    PseudoHuber,
    Trajectories,
    TrajectoryRegression,
)
from agents.runs.checkpoints import Checkpoints
from agents.training.learner import Cosine, Learner
from agents.updates.optimizers import AdamW
from diffusion_gym.models import DiffusionModel, load_model
from diffusion_gym.models.latent_consistency import write_latent_consistency
from diffusion_gym.prompts import make_prompts

from .dataset import IconData, NameSampler, draw_captions, draw_colours
from .export import PACKAGE
from .samples import GUIDANCE_SCALE, lay_out
from .sources import WORK

logger = logging.getLogger(__name__)

INDICES = 800
SKIP = 50
# The gradient's norm is 50 to 250 from the first update to the last, so that it is always clipped.
OPTIMIZER = AdamW(weight_decay=0.0, betas=(0.9, 0.99), warmup_updates=50, max_grad_norm=5.0, ema_decay=0.99)
METRIC = PseudoHuber(0.0173)  # 0.00054·√1024


def random_captions(data: IconData, count: int, *, seed: int) -> list[str]:
    """Return captions as the teacher was trained on, none of them empty."""
    generator = torch.Generator().manual_seed(seed)
    names = NameSampler(data).draw(count, generator)
    return draw_captions(names, draw_colours(count, generator), generator, empty=0.0)


def real_latents(model: DiffusionModel, data: IconData, count: int, *, seed: int) -> Latents:
    """Return the latents of augmented icons, captioned."""
    generator, sampler = torch.Generator().manual_seed(seed), NameSampler(data)
    latents, captions = [], []
    for start in range(0, count, 128):
        batch = data.batch(sampler.draw(min(128, count - start), generator), generator)
        latents.append(model.encode(batch.images).half())
        captions += draw_captions(batch.names, batch.colours, generator, empty=0.0)
    return Latents(torch.cat(latents), captions)


@dataclass
class Args:
    """Distil a latent consistency model."""

    work: Path = WORK
    """Where everything is read and written."""
    teacher: Path = PACKAGE / "models" / "emoji"
    """The pipeline folder of the teacher."""
    init: Path | None = None
    """A pipeline folder of such a student to go on from, without the first stage."""
    trajectories: int = 1024
    """How many of the teacher's trajectories are drawn."""
    real: int = 3072
    """How many icons are encoded; half of distillation's x_0 are theirs, half the teacher's samples."""
    start_images: int = 8192
    """Images of the first stage."""
    start_rate: float = 4e-4
    """AdamW's learning rate there, at its peak."""
    images: int = 60_000
    """Images of distillation."""
    learning_rate: float = 3e-4
    """AdamW's there, at its peak."""
    batch_size: int = 32
    """Images of an update of distillation; twice as many in the first stage."""
    every: int = 100
    """Updates between two checkpoints."""
    per_prompt: int = 2
    """Samples of each animal in the grids; 0: no grids."""
    seed: int = 0
    """Of captions, noises and times."""


def trained(run: Learner, total: int, folder: Path, args: Args) -> Path:
    """Train a run to its end, with checkpoints, logs and grids of samples; return the folder of its pipeline."""
    prompts = list(make_prompts("simple_animals"))
    callbacks: list[BaseCallback] = [Checkpoints(folder / "checkpoints", every=args.every, keep=1)]
    if args.per_prompt:
        callbacks.append(SampleGrid(prompts[:16], every=4 * args.every))
    started, first = time.process_time(), run.num_timesteps
    run.learn(total - run.num_timesteps, callbacks, reset_num_timesteps=False)
    logger.info("%s: %d images, %.0f CPU s", folder, run.num_timesteps - first, time.process_time() - started)
    repeated = [prompt for prompt in prompts for _ in range(args.per_prompt)]
    for num_steps in (1, 2, 4) if repeated else ():
        images = run.draw(repeated, num_steps=num_steps, seeds=range(len(repeated)))
        lay_out(images, prompts, per_label=args.per_prompt, columns=9).save(folder / f"grid_{num_steps}.png")
    return run.save_pipeline(folder / "pipeline")


def regressed(args: Args, teacher: DiffusionModel, data: Trajectories, folder: Path) -> Path:
    """Return the pipeline folder of a student that was regressed on the ends of trajectories."""
    if (folder / "pipeline").is_dir():
        return folder / "pipeline"
    student = load_model(
        write_latent_consistency(
            folder.parent / "student",
            teacher,
            num_train_timesteps=INDICES,
            original_steps=INDICES // SKIP,
            guidance_size=32,
        )
    )
    log = str(folder)
    if Checkpoints(folder / "checkpoints").found():
        run = TrajectoryRegression.load(folder / "checkpoints", student, data=data, tensorboard_log=log)
    else:
        run = TrajectoryRegression(
            student,
            data=data,
            guidance=FixedGuidance(GUIDANCE_SCALE),
            metric=METRIC,
            learning_rate=Cosine(args.start_rate),
            batch_size=2 * args.batch_size,
            optimizer=OPTIMIZER,
            seed=args.seed,
            tensorboard_log=log,
        )
    return trained(run, args.start_images, folder, args)


def distilled(args: Args, teacher: DiffusionModel, student: DiffusionModel, data: Latents, folder: Path) -> Path:
    """Return the pipeline folder of a student that was distilled from the teacher."""
    if (folder / "pipeline").is_dir():
        return folder / "pipeline"
    log = str(folder)
    if Checkpoints(folder / "checkpoints").found():
        run = ConsistencyDistillation.load(
            folder / "checkpoints", student, data=data, teacher=teacher, tensorboard_log=log
        )
    else:
        run = ConsistencyDistillation(
            student,
            data=data,
            teacher=teacher,
            solver=Euler(),
            discretisation=EveryIndex(SKIP),
            target=Averaged(0.95),
            guidance=FixedGuidance(GUIDANCE_SCALE),
            metric=METRIC,
            learning_rate=Cosine(args.learning_rate),
            batch_size=args.batch_size,
            optimizer=OPTIMIZER,
            seed=args.seed + 1,
            tensorboard_log=log,
        )
    return trained(run, args.images, folder, args)


def main(args: Args) -> None:
    folder = args.work / "consistency"
    teacher = load_model(args.teacher)
    data = IconData(args.work / "icons")
    trajectories = Trajectories.draw(
        teacher,
        random_captions(data, args.trajectories, seed=args.seed),
        times=torch.cat([torch.arange(INDICES - 1, 0, -SKIP), torch.zeros(1)]),
        guidance_scale=GUIDANCE_SCALE,
        seed=args.seed,
        cache=folder / "trajectories",
    )
    start = args.init or regressed(args, teacher, trajectories, folder / "start")
    own = trajectories.ends
    latents = own * max(1, args.real // len(own)) + real_latents(teacher, data, args.real, seed=args.seed + 1)
    pipeline = distilled(args, teacher, load_model(start), latents, folder / "distillation")
    logger.info("%s", pipeline)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(Args, description=__doc__))
