"""How fast the embedded model draws and loads, in turn with another pipeline folder.

    python benchmarks/emoji_speed.py --other build/emoji/prototype/diffusion_gym/models/emoji

20 DDIM steps with guidance 4 and the decoding, in bfloat16 autocast as examples and tools draw, and in float32. The two
folders are run in turn; medians are printed.
"""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from diffusion_gym.models import DiffusionModel, load_model
from diffusion_gym.sampling import sample_latents

LOAD = """
import time
import diffusers, transformers
from diffusion_gym.models import load_model
import diffusion_gym.models.stable_diffusion
started = time.perf_counter()
model = load_model("emoji")
conditioning = model.encode_prompts(["a cat"])
model.denoiser
model.decode(__import__("torch").zeros(1, *model.latent_shape))
print(time.perf_counter() - started)
"""


@dataclass
class Args:
    """What is timed."""

    other: Path | None = None
    """A pipeline folder to alternate with; none: the embedded model alone."""
    batches: tuple[int, ...] = (1, 16, 64)
    """Samples at once."""
    num_runs: int = 3
    """Runs of each."""
    num_steps: int = 20
    """DDIM steps."""
    num_threads: int = 2
    """CPU threads."""


@torch.no_grad()
def draw(model: DiffusionModel, batch: int, num_steps: int, *, autocast: bool) -> None:
    conditioning = model.encode_prompts(["a cat"])
    conditioning = {key: value.expand(batch, -1, -1) for key, value in conditioning.items()}
    noise = torch.randn(batch, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        latents = sample_latents(model, noise, conditioning, model.schedule.timesteps(num_steps), guidance_scale=4.0)
    model.decode(latents)


def main(args: Args) -> None:
    torch.set_num_threads(args.num_threads)
    sources = ["emoji", *([args.other] if args.other else [])]
    models = {str(source): load_model(source) for source in sources}
    for autocast in (True, False):
        for batch in args.batches:
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for run in range(args.num_runs + 1):
                for name, model in models.items():
                    started = time.perf_counter()
                    draw(model, batch, args.num_steps, autocast=autocast)
                    if run:  # the first is a warm-up
                        seconds[name].append(time.perf_counter() - started)
            speeds = {name: batch / statistics.median(values) for name, values in seconds.items()}
            precision = "bfloat16" if autocast else "float32"
            print(f"{precision}, batch {batch}: " + ", ".join(f"{n} {v:.2f} samples/s" for n, v in speeds.items()))
    loads = [float(subprocess.check_output([sys.executable, "-c", LOAD])) for _ in range(args.num_runs)]
    print(f"loading all parts, libraries imported before: {statistics.median(loads):.2f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
