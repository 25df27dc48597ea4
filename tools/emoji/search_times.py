"""Search the times of a consistency model by the distance of its samples to real icons.

    python -m tools.emoji.search_times --model emoji_consistency

searches them for 2 and 3 steps, and compares what it finds with the model's own, equally spaced ones on noises that the
search did not see. Writes `report.json` to `build/emoji/times/`. It needs `build/emoji/icons`
(`python -m tools.emoji.icons`) and takes 3 CPU minutes.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from diffusion_gym.consistency.time_search import search_times
from diffusion_gym.grids import grid_through
from diffusion_gym.models import load_model
from diffusion_gym.models.base import Conditioning, DiffusionModel
from diffusion_gym.prompts.base import with_article
from diffusion_gym.sampling import sample_latents
from diffusion_gym.transitions import draw_noise

from .dataset import IconData
from .evaluate import BOOTSTRAPS, evaluation_set, frechet_distance
from .export import CLASSIFIER
from .sources import WORK
from .train_classifier import Classifier
from .training import autocast

CHUNK = 64


@dataclass
class Args:
    """Search the times of a consistency model."""

    model: str = "emoji_consistency"
    """Its name or folder."""
    work: Path = WORK
    """Where the icons are, and where the report is written."""
    per_animal: int = 6
    """Samples of each animal in the search."""
    per_animal_held_out: int = 20
    """Samples of each animal in the comparison."""
    num_steps: tuple[int, ...] = (2, 3)
    """The numbers of steps."""
    candidates: int = 16
    """Steps of the model's own grid whose times are candidates."""


def noise_of(model: DiffusionModel, seeds: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """Return x_T of each seed, and where the noise of later steps is drawn from."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return draw_noise(torch.empty(len(seeds), *model.latent_shape), generators), generators


@torch.no_grad()
def features_at(
    model: DiffusionModel, times: Sequence[float], prompts: Conditioning, seeds: Sequence[int], classifier: Classifier
) -> Tensor:
    """Return the classifier's features [N, F] of samples at these times."""
    grid, features = grid_through(model.schedule, times), []
    for start in range(0, len(seeds), CHUNK):
        rows = slice(start, start + CHUNK)
        noise, generators = noise_of(model, seeds[rows])
        conditioning = {key: value[rows] for key, value in prompts.items()}
        with autocast():
            latents = sample_latents(
                model, noise, conditioning, grid, sampler=model.default_sampler, generators=generators
            )
        features.append(classifier.features_and_logits(model.decode(latents))[0])
    return torch.cat(features)


def compare(real: Tensor, found: Tensor, even: Tensor) -> dict[str, float]:
    """Return both distances, and by how much the found times' is smaller with its paired bootstrap error."""
    generator, gains = torch.Generator().manual_seed(0), []
    for _ in range(BOOTSTRAPS):
        real_rows, rows = (torch.randint(0, len(one), (len(one),), generator=generator) for one in (real, found))
        gains.append(frechet_distance(real[real_rows], even[rows]) - frechet_distance(real[real_rows], found[rows]))
    distances = {name: frechet_distance(real, features) for name, features in (("found", found), ("even", even))}
    return {**distances, "gain": distances["even"] - distances["found"], "error": float(np.std(gains))}


def main(args: Args) -> None:
    data, classifier, model = IconData(args.work / "icons"), Classifier(CLASSIFIER), load_model(args.model)
    candidates = model.schedule.timesteps(args.candidates)[:-1].tolist()

    def evaluation(per_animal: int) -> tuple[Tensor, Conditioning, list[int]]:
        names, seeds = evaluation_set(per_animal)
        real = classifier.features_and_logits(data.batch(names, torch.Generator().manual_seed(0)).images)[0]
        return real, model.encode_prompts([with_article(name) for name in names]), seeds

    real, prompts, seeds = evaluation(args.per_animal)
    noise, _ = noise_of(model, seeds)

    def distance(images: Tensor) -> float:
        return frechet_distance(real, classifier.features_and_logits(images)[0])

    held_out_real, held_out_prompts, held_out_seeds = evaluation(args.per_animal_held_out)
    held_out_seeds = [50_000 + seed for seed in held_out_seeds]
    report = {}
    for num_steps in args.num_steps:
        began = time.process_time()
        with autocast():
            search = search_times(
                model, noise, prompts, distance, num_steps=num_steps, candidates=candidates, batch_size=CHUNK
            )
        even = model.schedule.timesteps(num_steps)[:-1].tolist()
        found_features, even_features = (
            features_at(model, times, held_out_prompts, held_out_seeds, classifier) for times in (search.times, even)
        )
        report[f"{num_steps} steps"] = {
            **asdict(search),
            "tried": {", ".join(f"{time:g}" for time in times): value for times, value in search.tried.items()},
            "CPU seconds": time.process_time() - began,
            "even times": even,
            "held out": compare(held_out_real, found_features, even_features),
        }
    folder = args.work / "times"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
