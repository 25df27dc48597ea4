"""Run every stage, from nothing to a judged model.

    python -m tools.emoji.chain            # many hours on one core
    python -m tools.emoji.chain --quick    # minutes: a test of the tools, not a model

A stage that was cut off goes on where it was; each can be run alone (README.md).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from . import (
    evaluate,
    export,
    tokenizer,
    train_classifier,
    train_consistency,
    train_flow,
    train_scorer,
    train_unet,
    train_vae,
)
from .icons import build
from .sources import ICONS, NAMES, REGISTRY, WORK, IconSource


@dataclass(frozen=True)
class Sizes:
    """How many images each stage sees."""

    vae: int
    unet: int
    flow: int
    consistency: int
    pool: int
    classifier: int
    scorer: int
    spoilt: int
    batch_size: int


QUICK = Sizes(
    vae=960, unet=960, flow=320, consistency=64, pool=512, classifier=1_920, scorer=960, spoilt=160, batch_size=32
)


@dataclass
class Args:
    """Run every stage."""

    work: Path = WORK
    """Where everything is written."""
    package: Path = export.PACKAGE
    """The package's folder, into which the weights are put."""
    registry: str = REGISTRY
    """The npm registry, or a mirror of it."""
    quick: bool = False
    """Train every network for moments only; the weights go to `<work>/package` instead of the package."""


def train(work: Path) -> None:
    """Train all networks, for as long as their own commands do."""
    train_vae.main(train_vae.Args(work))
    train_unet.main(train_unet.Args(work))
    train_flow.main(train_flow.Args(work, emoji=work / "unet" / "pipeline"))
    train_consistency.main(train_consistency.Args(work, work / "unet" / "pipeline"))
    train_classifier.main(train_classifier.Args(work))
    train_scorer.main(train_scorer.Args(work, work / "unet" / "pipeline"))


def train_quickly(work: Path, sizes: Sizes) -> None:
    """Train all networks for moments."""
    batch = {"batch_size": sizes.batch_size, "save_every": 1_000_000}
    train_vae.main(train_vae.Args(work, images=sizes.vae, **batch))
    train_unet.main(train_unet.Args(work, images=sizes.unet, pool=sizes.pool, per_prompt=1, **batch))
    train_classifier.main(train_classifier.Args(work, images=sizes.classifier, **batch))
    pipeline = work / "unet" / "pipeline"
    train_flow.main(train_flow.Args(work, emoji=pipeline, images=sizes.flow, pool=sizes.pool, per_prompt=1, **batch))
    distilled = {"trajectories": 16, "real": 32, "start_images": sizes.consistency, "images": sizes.consistency}
    train_consistency.main(train_consistency.Args(work, pipeline, batch_size=sizes.batch_size, **distilled))
    train_scorer.main(train_scorer.Args(work, pipeline, images=sizes.scorer, spoilt=sizes.spoilt, **batch))


def main(args: Args, *, icons: Sequence[IconSource] = ICONS, names: IconSource = NAMES) -> None:
    build(args.work, icons, names, args.registry)
    tokenizer.main(tokenizer.Args(args.work))
    if args.quick:
        train_quickly(args.work, QUICK)
    else:
        train(args.work)
    aside = args.work / "package"
    weights = (
        export.Args(args.work, aside, aside / "classifier") if args.quick else export.Args(args.work, args.package)
    )
    export.main(weights)
    judged = evaluate.Args(
        args.work / "unet" / "pipeline",
        "chain",
        args.work,
        classifier=weights.classifier,
        scorer=args.work / "scorer" / "scorer",
    )
    if args.quick:
        judged = replace(judged, steps=(1, 4), per_animal=2, per_prompt=1)
    evaluate.main(judged)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(Args, description=__doc__))
