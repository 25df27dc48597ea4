"""Run every stage, from nothing to a judged model.

    python -m tools.emoji.chain            # a day on one core
    python -m tools.emoji.chain --quick    # five minutes: a test of the tools, not a model

A stage that was cut off goes on where it was; each can be run alone (README.md).
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import tyro

from . import (
    evaluate,
    export,
    icons,
    sources,
    tokenizer,
    train_classifier,
    train_scorer,
    train_unet,
    train_vae,
)


@dataclass
class Args:
    """Run every stage."""

    work: Path = sources.WORK
    """Where everything is written."""
    package: Path = export.PACKAGE
    """The package's folder, into which the weights are put."""
    quick: bool = False
    """Train every network for moments only; the weights go to `<work>/package` instead of the package."""


def train(work: Path, *, quick: bool) -> None:
    """Train all networks."""
    short = {"batch_size": 32, "save_every": 10_000}
    train_vae.main(train_vae.Args(work, images=1_600, **short) if quick else train_vae.Args(work))
    train_unet.main(
        train_unet.Args(work, images=1_600, pool=1_024, **short) if quick else train_unet.Args(work, images=900_000)
    )
    train_classifier.main(train_classifier.Args(work, images=3_200, **short) if quick else train_classifier.Args(work))
    pipeline = work / "unet" / "pipeline"
    train_scorer.main(
        train_scorer.Args(work, pipeline, images=1_600, spoilt=320, **short)
        if quick
        else train_scorer.Args(work, pipeline)
    )


def main(args: Args) -> None:
    sources.main(sources.Args(args.work))
    icons.main(icons.Args(args.work))
    tokenizer.main(tokenizer.Args(args.work))
    train(args.work, quick=args.quick)
    export.main(export.Args(args.work, args.work / "package" if args.quick else args.package))
    judged = evaluate.Args(args.work / "unet" / "pipeline", "chain", args.work, scorer=args.work / "scorer" / "scorer")
    if args.quick:
        judged.steps, judged.per_animal = (2, 20), 2
    evaluate.main(judged)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(Args, description=__doc__))
