"""Put the trained weights where they are committed, in the form in which they ship.

    python -m tools.emoji.export

UNet, transformer and autoencoder in float16, the text encoders in float32 (transformers 5 would open a float16 one in
float16, beside a float32 UNet; `emoji_consistency`'s, which has to be small, is told not to be) with the `text_model.`
prefix that transformers 4 needs, the tokenizers with the `vocab.json` and `merges.txt` that transformers 5 no longer
writes; the scorer's encoders and the classifier in float16.
The model cards stay as they are.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizerFast

from agents.runs.files import replaced_folder

from .sources import WORK

PACKAGE = Path(__file__).parents[2] / "diffusion_gym"
CLASSIFIER = Path(__file__).parent / "classifier"
TEXT_ENCODER = ("config.json", "model.safetensors")
TOKENIZER = ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")
NETWORK = ("config.json", "diffusion_pytorch_model.safetensors")
PARTS = {
    "scheduler": ("scheduler_config.json",),
    "text_encoder": TEXT_ENCODER,
    "text_encoder_2": TEXT_ENCODER,
    "tokenizer": TOKENIZER,
    "tokenizer_2": TOKENIZER,
    "transformer": NETWORK,
    "unet": NETWORK,
    "vae": NETWORK,
}


def write_vocabulary(tokenizer: Path, vocabulary: Mapping[str, int], merges: Iterable[str | Sequence[str]]) -> None:
    """Write a tokenizer's `vocab.json` and `merges.txt`."""
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    (tokenizer / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{line}\n" for line in lines))


def rewrite_weights(file: Path, *, dtype: torch.dtype, prefix: str = "") -> None:
    """Write a file's floating-point tensors in another precision, and all names with a prefix if they lack it."""

    def renamed(name: str) -> str:
        return name if name.startswith((prefix, "text_projection")) else prefix + name

    def converted(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    weights = {renamed(name): converted(tensor).contiguous() for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def drop_origin(config: Path) -> None:
    """Take out of a config where on this machine its weights came from."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2) + "\n")


def make_readable(folder: Path) -> None:
    """Let everybody read what safetensors writes for its owner alone."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    folder.chmod(0o755)


def shrink_text(folder: Path) -> None:
    """Write a text encoder's weights in float16, to be read as float32, and its tokenizer without white space.

    transformers 5 reads weights in the precision that the config names, and only without one in the file's own.
    """
    rewrite_weights(folder / "text_encoder" / "model.safetensors", dtype=torch.float16)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), ensure_ascii=False, separators=(",", ":")))


def export_small_pipeline(pipeline: Path, target: Path) -> None:
    """Replace a packaged pipeline by a trained one, with a text encoder in float16."""
    export_pipeline(pipeline, target)
    shrink_text(target)


def export_pipeline(pipeline: Path, target: Path) -> None:
    """Replace a packaged pipeline by a trained one; its README.md stays."""
    with replaced_folder(target) as folder:
        for part, names in PARTS.items():
            if not (pipeline / part).is_dir():
                continue
            shutil.copytree(pipeline / part, folder / part)
            if names == TOKENIZER:  # transformers 4 saves a pipeline's without tokenizer.json
                CLIPTokenizerFast.from_pretrained(pipeline / part).save_pretrained(folder / part)
                model = json.loads((folder / part / "tokenizer.json").read_text())["model"]
                write_vocabulary(folder / part, model["vocab"], model["merges"])
            for extra in {path.name for path in (folder / part).iterdir()} - set(names):
                (folder / part / extra).unlink()
            for file in (folder / part).glob("*.safetensors"):
                is_text = names == TEXT_ENCODER
                dtype = torch.float32 if is_text else torch.float16
                rewrite_weights(file, dtype=dtype, prefix="text_model." if is_text else "")
            if "config.json" in names:
                drop_origin(folder / part / "config.json")
        index = json.loads((pipeline / "model_index.json").read_text())
        if "text_encoder_3" in index:
            index["_max_sequence_length"] = 0  # read by `load_model`: the fewest of T5's rows of zeros, and the fastest
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        if (target / "README.md").is_file():
            shutil.copy(target / "README.md", folder)
        make_readable(folder)


def export_scorer(scorer: Path, target: Path) -> None:
    """Replace the packaged scorer by a trained one, without its tokenizer, which is the pipeline's."""
    with replaced_folder(target) as folder:
        shutil.copy(scorer / "scorer.json", folder)
        for part, prefix in (("image_encoder", ""), ("text_encoder", "text_model.")):
            (folder / part).mkdir()
            for name in ("config.json", "model.safetensors"):
                shutil.copy(scorer / part / name, folder / part)
            rewrite_weights(folder / part / "model.safetensors", dtype=torch.float16, prefix=prefix)
        make_readable(folder)


def export_classifier(classifier: Path, target: Path) -> None:
    """Replace the committed classifier, which does not ship, by a trained one."""
    with replaced_folder(target) as folder:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(classifier / name, folder)
        rewrite_weights(folder / "model.safetensors", dtype=torch.float16)
        make_readable(folder)


def megabytes(folder: Path) -> float:
    """Return what a folder takes on the disk."""
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file()) / 1e6


@dataclass
class Args:
    """Put the trained weights into the package."""

    work: Path = WORK
    """Where the trained weights are."""
    package: Path = PACKAGE
    """The package's folder."""
    classifier: Path = CLASSIFIER
    """Where the classifier that judges is committed."""


def main(args: Args) -> None:
    for trained, target, export in (
        (args.work / "unet" / "pipeline", args.package / "models" / "emoji", export_pipeline),
        (args.work / "flow" / "pipeline", args.package / "models" / "emoji_flow", export_pipeline),
        (
            args.work / "consistency" / "distillation" / "pipeline",
            args.package / "models" / "emoji_consistency",
            export_small_pipeline,
        ),
        (args.work / "scorer" / "scorer", args.package / "rewards" / "emoji_scorer", export_scorer),
        (args.work / "classifier" / "classifier", args.classifier, export_classifier),
    ):
        if not trained.is_dir():
            print(f"{trained} is not there: {target} stays as it is")
            continue
        export(trained, target)
        print(f"{target}: {megabytes(target):.1f} MB")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
