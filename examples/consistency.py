"""A consistency model of few steps: distilled from the embedded model, sampled, saved, edited with.

    python examples/consistency.py --quick

The teacher's trajectories are drawn, f is regressed on their ends, then distilled. Writes `samples.png`, the same
noises in 1, 2 and 4 steps of the student (one pass each) and in the teacher's 4 (two passes each), `edits.png`, the
right halves of these completed in 8 steps, and `pipeline/`, which diffusers opens; with `--quick` in 8 minutes on a
shared core:

    LatentConsistencyModelPipeline.from_pretrained("runs/consistency/pipeline")("a fox", num_inference_steps=2)
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image

from agents import ConsistencyDistillation, Cosine, Trajectories, TrajectoryRegression
from agents.consistency import Euler, EveryIndex, FixedGuidance, PseudoHuber
from agents.logs.images import captioned_grid
from agents.updates.optimizers import AdamW
from diffusion_gym.consistency.editing import edit
from diffusion_gym.consistency.operators import Inpainting
from diffusion_gym.models import DiffusionModel, load_model
from diffusion_gym.models.latent_consistency import write_latent_consistency
from diffusion_gym.prompts import make_prompts
from diffusion_gym.sampling import sample_latents
from diffusion_gym.transitions import draw_noise

SHOWN = 8


@dataclass
class Args:
    """Distil a consistency model."""

    quick: bool = False
    """A quarter of the trajectories and an eighth of the images: to see that it works, not how well."""
    model: str = "emoji"
    """The teacher: a Stable Diffusion."""
    trajectories: int = 768
    """How many trajectories of the teacher are drawn."""
    start_images: int = 6144
    """Images of the regression on their ends."""
    images: int = 16_384
    """Images of the distillation."""
    batch_size: int = 32
    """Images of an update."""
    guidance_scale: float = 4.0
    """The guidance that is folded in."""
    indices: int = 800
    """The student's noisiest index; at the last ones of an ε-prediction errors are multiplied too much."""
    skip: int = 50
    """Indices between two times of the student."""
    seed: int = 0
    """Of the training."""
    output: Path = Path("runs/consistency")
    """Where to write."""


def teacher_samples(model: DiffusionModel, prompts: list[str], guidance_scale: float) -> torch.Tensor:
    """Return images of the teacher in 4 steps, from the noises of the seeds 0, 1, 2 …."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    noise = draw_noise(torch.empty(len(prompts), *model.latent_shape, device=model.device), generators)
    conditioning, times = model.encode_prompts(prompts), model.schedule.timesteps(4)
    return model.decode(sample_latents(model, noise, conditioning, times, guidance_scale=guidance_scale))


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.quick:
        args.trajectories, args.start_images, args.images = 192, 1536, 2048
    teacher = load_model(args.model)
    folder = write_latent_consistency(
        args.output / "student",
        teacher,
        num_train_timesteps=args.indices,
        original_steps=args.indices // args.skip,
        guidance_size=32,
    )
    student = load_model(folder)
    prompts = list(make_prompts("simple_animals"))
    drawn_prompts = (prompts * (args.trajectories // len(prompts) + 1))[: args.trajectories]
    times = torch.cat([torch.arange(args.indices - 1, 0, -args.skip), torch.zeros(1)])

    started = time.monotonic()
    trajectories = Trajectories.draw(teacher, drawn_prompts, times=times, guidance_scale=args.guidance_scale)
    print(f"{len(trajectories)} trajectories in {time.monotonic() - started:.0f} s")

    shared = {
        "guidance": FixedGuidance(args.guidance_scale),
        "metric": PseudoHuber(),
        "optimizer": AdamW(weight_decay=0.0, betas=(0.9, 0.99), warmup_updates=20, max_grad_norm=5.0, ema_decay=0.99),
        "batch_size": args.batch_size,
        "seed": args.seed,
    }
    start = TrajectoryRegression(student, data=trajectories, learning_rate=Cosine(4e-4), **shared)
    start.learn(args.start_images, progress_bar=True)
    regressed = load_model(start.save_pipeline(args.output / "start"))
    print(f"regressed on their ends after {time.monotonic() - started:.0f} s")

    run = ConsistencyDistillation(
        regressed,
        data=trajectories.ends,
        teacher=teacher,
        solver=Euler(),
        discretisation=EveryIndex(args.skip),
        learning_rate=Cosine(2e-4),
        **shared,
    )
    run.learn(args.images, progress_bar=True)
    print(f"distilled after {time.monotonic() - started:.0f} s")

    pipeline = run.save_pipeline(args.output / "pipeline")
    shown = prompts[:SHOWN]
    rows = [run.draw(shown, num_steps=count, seeds=range(SHOWN)) for count in (1, 2, 4)]
    rows.append(teacher_samples(teacher, shown, args.guidance_scale))
    passes = ("1 step", "2 steps", "4 steps", "teacher, 8 passes")
    captions = [(prompt, words) for words in passes for prompt in shown]
    Image.fromarray(captioned_grid(torch.cat(rows), captions, columns=SHOWN)).save(args.output / "samples.png")
    print(f"{args.output / 'samples.png'}, {pipeline}")

    images = rows[-1]
    free = torch.arange(images.shape[3]).expand(images.shape[2:]) >= images.shape[3] // 2
    completed = edit(load_model(pipeline), images, shown, Inpainting(free), num_steps=8, seed=args.seed)
    masked = images.masked_fill(free, 0.5)
    captions = [(prompt, words) for words in ("right half free", "completed") for prompt in shown]
    edits = captioned_grid(torch.cat([masked, completed]), captions, columns=SHOWN)
    Image.fromarray(edits).save(args.output / "edits.png")
    print(f"{args.output / 'edits.png'}; all in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
