"""Judge a pipeline folder by numbers and pictures.

    python -m tools.emoji.evaluate --pipeline diffusion_gym/models/emoji --tag final

draws 45 samples of each of the 45 animals at 5, 10, 20 and 50 steps from the same noises and
writes to `build/emoji/evaluation/<tag>/`:

- `samples_<steps>_<weights>.npy`, which are not drawn again;
- `animals.png`, `things.png`: grids at 20 steps;
- `report.json`: the share of samples that the classifier names as their prompt, per animal too; the FID-like distance
  to real icons at each number of steps, with bootstrap errors; JPEG sizes; and, with `--scorer`, how the scorer's
  retrieval and its rank correlation with the number of steps stand.

The model before this one: `git archive 8ffeeb3 diffusion_gym/models/emoji | tar x -C build/emoji/prototype`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from scipy.stats import spearmanr
from torch import Tensor

from diffusion_gym.grids import karras_grid, shifted_grid, uniform_grid
from diffusion_gym.models import DiffusionModel, load_model
from diffusion_gym.prompts.base import with_article
from diffusion_gym.rewards.emoji_alignment import EmojiScorer
from diffusion_gym.rewards.jpeg import jpeg_kilobytes
from diffusion_gym.schedules import NoiseSchedule

from .dataset import IconData, NameSampler
from .export import CLASSIFIER
from .icons import ANIMALS
from .samples import GUIDANCE_SCALE, draw_grid, draw_samples
from .sources import WORK
from .train_classifier import Classifier, animal_accuracy, total_accuracy
from .train_scorer import retrieval_top1

THINGS = (
    *(
        "pizza",
        "hamburger",
        "banana",
        "red apple",
        "strawberry",
        "watermelon",
        "doughnut",
        "birthday cake",
        "ice cream",
    ),
    *("bread", "carrot", "mushroom", "sunflower", "rose", "cactus", "christmas tree", "rainbow", "full moon", "star"),
    *("automobile", "bus", "bicycle", "airplane", "rocket", "sailboat", "house", "guitar", "soccer ball", "balloon"),
    *("umbrella", "key", "hammer", "light bulb", "books", "alarm clock", "crown", "robot", "ghost", "snowman", "skull"),
)
BOOTSTRAPS = 50
SCORED_STEPS = (1, 2, 3, 5, 10, 20)


def consistency_grid(schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Return the times at which `emoji_consistency` draws, for the model that it was distilled from."""
    times = load_model("emoji_consistency").schedule.timesteps(num_steps)
    times[-1] = schedule.timesteps(num_steps)[-1]  # where the model itself ends
    return times


GRIDS = {
    "own": None,
    "uniform": uniform_grid,
    "shifted": shifted_grid,
    "karras": karras_grid,
    "consistency": consistency_grid,
}


@dataclass
class Args:
    """Judge a pipeline folder."""

    pipeline: Path
    """What is judged."""
    tag: str
    """What the judgement is called."""
    work: Path = WORK
    """Where the icons are, and where the judgement is written."""
    classifier: Path = CLASSIFIER
    """The classifier's folder."""
    scorer: Path | None = None
    """A scorer's folder, to judge too."""
    steps: tuple[int, ...] = (5, 10, 20, 50)
    """The numbers of DDIM steps, or of a consistency model's."""
    picture_steps: int = 20
    """Steps of the grids."""
    grid: Literal["own", "uniform", "shifted", "karras", "consistency"] = "own"
    """The times of the samples that are judged: the checkpoint's, or shifted by 3 as Stable Diffusion 3's, …."""
    guidance_scale: float = GUIDANCE_SCALE
    """Of the samples that are classified; the grids have 4."""
    per_prompt: int = 4
    """Samples of each prompt in the grids and in the scorer's rank correlation."""
    per_animal: int = 45
    """Samples of each animal and number of steps."""


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½) of two sets of features [N, F].

    Source: Heusel et al., 2017, eq. 6, https://arxiv.org/abs/1706.08500.
    """
    x, y = first.double().numpy(), second.double().numpy()
    covariance_x, covariance_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # The trace of a square root is the sum of the roots of the eigenvalues, real and not negative up to rounding.
    roots = np.sqrt(np.linalg.eigvals(covariance_x @ covariance_y).real.clip(min=0))
    distance = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(covariance_x + covariance_y) - 2 * roots.sum()
    return float(distance)


def bootstrap_distances(real: Tensor, drawn: Mapping[int, Tensor], *, seed: int = 0) -> dict[str, Mapping[str, float]]:
    """Return the distance at every number of steps, and between numbers of steps, each with a bootstrap error.

    The samples of all numbers of steps come from the same noises, and each bootstrap takes the same rows of them all,
    so the error of a difference is that of a paired comparison.

    Args:
        real: [N, F] features of real icons.
        drawn: For each number of steps [N, F] features of the samples.
        seed: Of the bootstrap.
    """
    generator = torch.Generator().manual_seed(seed)
    distances: dict[int, list[float]] = {num_steps: [] for num_steps in drawn}
    for _ in range(BOOTSTRAPS):
        real_rows = torch.randint(0, len(real), (len(real),), generator=generator)
        count = len(next(iter(drawn.values())))
        rows = torch.randint(0, count, (count,), generator=generator)
        for num_steps, features in drawn.items():
            distances[num_steps].append(frechet_distance(real[real_rows], features[rows]))
    report = {
        f"{num_steps} steps": {
            "distance": frechet_distance(real, features),
            "error": float(np.std(distances[num_steps])),
        }
        for num_steps, features in drawn.items()
    }
    for low, high in zip(sorted(drawn)[:-1], sorted(drawn)[1:], strict=True):
        gains = np.subtract(distances[low], distances[high])
        report[f"{low} to {high} steps"] = {"gain": float(gains.mean()), "error": float(gains.std())}
    return report


def evaluation_set(per_animal: int) -> tuple[list[str], list[int]]:
    """Return the animals and the seeds of the samples: neighbours are different animals, no seed comes twice."""
    names = [animal for _ in range(per_animal) for animal in ANIMALS]
    return names, list(range(10_000, 10_000 + len(names)))


def fingerprint(pipeline: Path) -> str:
    """Return a name for a pipeline's weights."""
    digest = hashlib.sha256()
    for file in sorted(pipeline.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def samples(args: Args, folder: Path, names: Sequence[str], seeds: Sequence[int], num_steps: int) -> Tensor:
    """Return the samples [N, 3, 64, 64] in [0, 1]: drawn, or as they were drawn before."""
    settings = "" if args.guidance_scale == GUIDANCE_SCALE else f"_guidance{args.guidance_scale:g}"
    settings += "" if args.grid == "own" else f"_{args.grid}"
    file = folder / f"samples_{num_steps}{settings}_{fingerprint(args.pipeline)}.npy"
    if not file.is_file() or len(np.load(file, mmap_mode="r")) != len(names):
        prompts = [with_article(name) for name in names]
        images = draw_samples(
            load_model(args.pipeline),
            prompts,
            seeds,
            num_steps=num_steps,
            guidance_scale=args.guidance_scale,
            grid=GRIDS[args.grid],
        )
        np.save(file, (images * 255).round().byte().numpy())
    return torch.from_numpy(np.load(file)) / 255


def classified(classifier: Classifier, images: Tensor, names: Sequence[str]) -> dict[str, object]:
    """Return the share of samples that are named as their prompt among the 45, in all and of each animal."""
    found = classifier.animals(images)
    right = {
        animal: np.mean([found[k] == animal for k, name in enumerate(names) if name == animal]) for animal in ANIMALS
    }
    return {
        "accuracy": float(np.mean(list(right.values()))),
        "animals right most of the time": int(sum(share > 0.5 for share in right.values())),
        "per animal": {animal: round(float(share), 3) for animal, share in right.items()},
    }


def scorer_report(
    scorer: EmojiScorer, model: DiffusionModel, held_out: IconData, every_name: Sequence[str], per_prompt: int
) -> dict[str, float]:
    """Return retrieval on the held-out style, and the rank correlation of score and number of steps.

    The correlation is Spearman's, of one prompt's and one noise's scores at 1 to 20 steps, averaged over the 45
    animals with `per_prompt` noises each.
    """
    names = [animal for animal in ANIMALS for _ in range(per_prompt)]
    prompts = [with_article(name) for name in names]
    seeds = list(range(20_000, 20_000 + len(names)))
    texts = scorer.embed_texts(prompts)
    scores = torch.stack(
        [
            (scorer.embed_images(draw_samples(model, prompts, seeds, num_steps=num_steps)) * texts).sum(-1)
            for num_steps in SCORED_STEPS
        ]
    )
    correlations = [spearmanr(SCORED_STEPS, row).statistic for row in scores.T.tolist()]
    means = {f"mean score at {k} steps": float(row.mean()) for k, row in zip(SCORED_STEPS, scores, strict=True)}
    return {
        "retrieval top-1, 45 animals": retrieval_top1(scorer, held_out, ANIMALS, among=ANIMALS),
        "retrieval top-1, all captions": retrieval_top1(scorer, held_out, every_name, among=every_name),
        "captions": len(every_name),
        "rank correlation with the number of steps": float(np.mean(correlations)),
        **means,
    }


def main(args: Args) -> None:
    folder = args.work / "evaluation" / args.tag
    folder.mkdir(parents=True, exist_ok=True)
    data, held_out = IconData(args.work / "icons"), IconData(args.work / "icons", held_out=True)
    classifier = Classifier(args.classifier)
    model = load_model(args.pipeline)
    draw_grid(model, per_prompt=args.per_prompt, num_steps=args.picture_steps).save(folder / "animals.png")
    things = [with_article(name) for name in THINGS if name in data.by_name]
    draw_grid(model, things, per_prompt=args.per_prompt, num_steps=args.picture_steps).save(folder / "things.png")

    names, seeds = evaluation_set(args.per_animal)
    drawn = {num_steps: samples(args, folder, names, seeds, num_steps) for num_steps in args.steps}
    real = data.batch(names, torch.Generator().manual_seed(0)).images
    features = {num_steps: classifier.features_and_logits(images)[0] for num_steps, images in drawn.items()}
    kilobytes = jpeg_kilobytes(drawn[max(args.steps)][:256])
    report: dict[str, object] = {
        "classifier": {
            "held-out style": total_accuracy(animal_accuracy(classifier, held_out)),
            "real icons as trained on": classified(classifier, real, names)["accuracy"],
        },
        "classified": {
            f"{num_steps} steps": classified(classifier, images, names) for num_steps, images in drawn.items()
        },
        "distance": bootstrap_distances(classifier.features_and_logits(real)[0], features),
        "jpeg kB": {
            "mean": float(kilobytes.mean()),
            "standard deviation": float(kilobytes.std()),
            "least": float(kilobytes.min()),
            "most": float(kilobytes.max()),
        },
    }
    if args.scorer:
        scorer = EmojiScorer.load(args.scorer, args.pipeline / "tokenizer")
        report["scorer"] = scorer_report(scorer, model, held_out, NameSampler(data).names, args.per_prompt)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
