"""Train the classifier that judges the samples: which of 1,100 things does a picture show?

    python -m tools.emoji.train_classifier

It is trained on the real icons of the styles to train on, strongly augmented, and judged on the held-out style. Its
features are those of the FID-like distance. It is for evaluation alone: no model is trained on what it says, and it
does not ship in the wheel.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from diffusion_gym.rewards.emoji_alignment import prepare

from .dataset import BACKGROUNDS, IconData, composite
from .distort import distort
from .icons import ANIMALS, PEOPLE, Icon
from .sources import WORK
from .training import TrainingRun, autocast

logger = logging.getLogger(__name__)

ANIMAL_SHARE = 0.5


def label(icon: Icon) -> str:
    """Return the class of an icon: its last, most general name ("cat face" is a "cat", "rooster" a "chicken")."""
    return icon.captions[-1]


def labels_of(data: IconData) -> list[str]:
    """Return the classes, the 45 animals first."""
    others = {label(icon) for icon in data.icons if icon.group != PEOPLE} - set(ANIMALS)
    return [*ANIMALS, *sorted(others)]


def resnet_config(**labels: dict[int, str] | dict[str, int]) -> ResNetConfig:
    """Return the small ResNet that classifier and scorer see with, 192 features."""
    return ResNetConfig(embedding_size=24, hidden_sizes=[24, 48, 96, 192], depths=[2] * 4, layer_type="basic", **labels)


def new_classifier(labels: Sequence[str]) -> ResNetForImageClassification:
    """Return a classifier with random weights."""
    names = dict(enumerate(labels))
    return ResNetForImageClassification(resnet_config(id2label=names, label2id={v: k for k, v in names.items()}))


class Classifier:
    """A trained classifier, to judge with.

    Args:
        folder: Where its weights are.
    """

    def __init__(self, folder: Path) -> None:
        self.network = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled features [B, F] and the logits [B, classes] of images in [0, 1]."""
        features = torch.cat(
            [self.network.resnet(prepare(part)).pooler_output.flatten(1) for part in images.split(128)]
        )
        return features, self.network.classifier(features)

    def animals(self, images: Tensor) -> list[str]:
        """Return for each image the most probable of the 45 animals."""
        logits = self.features_and_logits(images)[1][:, : len(ANIMALS)]
        return [ANIMALS[index] for index in logits.argmax(-1).tolist()]


def plain(rgba: Tensor, colour: str = "white") -> Tensor:
    """Return icons upright and unaltered on a plain background, images [B, 3, 64, 64] in [0, 1]."""
    count = len(rgba)
    background = (torch.tensor(BACKGROUNDS[colour]) / 255).expand(count, 3)
    return composite(
        rgba,
        background,
        flip=torch.zeros(count, dtype=torch.bool),
        scale=torch.full((count,), 0.9),
        shift=torch.zeros(count, 2),
        rotation=torch.zeros(count),
    )


def animal_accuracy(classifier: Classifier, data: IconData, *, seed: int = 0) -> dict[str, tuple[int, int]]:
    """Return for each animal how many of its icons are named right among the 45, and how many there are.

    Every icon is shown plain on white, and twice augmented as the model's training pictures are.
    """
    rows = [index for index, icon in enumerate(data.icons) if label(icon) in ANIMALS]
    truth = [label(data.icons[row]) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    views = [plain(data.rgba[rows])]
    for _ in range(2):
        batch = data.batch(truth, generator)
        views.append(batch.images)
    counts = dict.fromkeys(ANIMALS, (0, 0))
    for images in views:
        for name, found in zip(truth, classifier.animals(images), strict=True):
            right, total = counts[name]
            counts[name] = (right + (name == found), total + 1)
    return counts


def total_accuracy(counts: dict[str, tuple[int, int]]) -> float:
    """Return the share of icons that are named right."""
    return sum(right for right, _ in counts.values()) / sum(total for _, total in counts.values())


@dataclass
class Args:
    """Train the classifier."""

    work: Path = WORK
    """Where everything is read and written."""
    init: Path | None = None
    """A classifier's folder to go on from; none: random weights."""
    images: int = 200_000
    """How many images to train for."""
    batch_size: int = 64
    """Images of a step."""
    learning_rate: float = 2e-3
    """AdamW's, at its peak."""
    save_every: int = 50_000
    """Images between two checkpoints."""
    seed: int = 0
    """Of everything random."""


def main(args: Args) -> None:
    data, held_out = IconData(args.work / "icons"), IconData(args.work / "icons", held_out=True)
    torch.manual_seed(args.seed)
    names = labels_of(data)
    rows_of: dict[str, list[int]] = {name: [] for name in names}
    for row, icon in enumerate(data.icons):
        if label(icon) in rows_of:
            rows_of[label(icon)].append(row)
    animal = torch.tensor([name in ANIMALS for name in names])
    weights = torch.where(animal, ANIMAL_SHARE / animal.sum(), (1 - ANIMAL_SHARE) / (~animal).sum())
    network: nn.Module = new_classifier(names)
    if args.init:
        network = ResNetForImageClassification.from_pretrained(args.init, dtype=torch.float32)
        if list(network.config.id2label.values()) != names:
            raise ValueError(
                f"the classes of {args.init} are not those of the icons in {args.work}: train from the start"
            )
    network.to(memory_format=torch.channels_last).train()

    def loss(run: TrainingRun) -> tuple[Tensor, dict[str, Tensor]]:
        generator = run.generator(args.seed)
        classes = torch.multinomial(weights, run.batch_size, replacement=True, generator=generator)
        uniform = torch.rand(run.batch_size, generator=generator).tolist()
        rows = [
            rows_of[names[k]][int(u * len(rows_of[names[k]]))] for k, u in zip(classes.tolist(), uniform, strict=True)
        ]
        images = distort(data.rgba[rows], generator)
        with autocast():
            logits = network(prepare(images)).logits.float()
        value = F.cross_entropy(logits, classes, label_smoothing=0.1)
        return value, {"loss": value, "accuracy": (logits.argmax(-1) == classes).float().mean()}

    def save(run: TrainingRun) -> None:
        network.save_pretrained(run.folder / "classifier")
        classifier = Classifier(run.folder / "classifier")
        counts = animal_accuracy(classifier, held_out)
        (run.folder / "held_out.json").write_text(json.dumps(counts))
        logger.info("%.1f %% of the held-out style's animals are named right", 100 * total_accuracy(counts))

    run = TrainingRun(
        network,
        args.work / "classifier",
        images=args.images,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=0.05,
        ema_decay=0.998,
    )
    run.fit(loss, save=save, save_every=args.save_every)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(Args, description=__doc__))
