"""Single-file checkpoints as folders in diffusers' layout, which `load_model` opens.

    python -m diffusion_gym.models.convert FILE FOLDER --config MODEL

writes FOLDER once; nothing is fetched but, if it is a Hub id, MODEL: the diffusers folder of the model that the file
was made from, such as "stable-diffusion-v1-5/stable-diffusion-v1-5" for a fine-tune of Stable Diffusion 1.5.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
    load_single_file_checkpoint,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from .base import outside_inference_mode
from .folders import read_config
from .loading import family_of, find_folder, load_model
from .pipeline import PipelineModel
from .understood import component

# How the names of a part's weights begin: of Stable Diffusion 1 and 2, XL, 3 and (as ComfyUI packs it) Flux.
_DENOISER = "model.diffusion_model."
_VAE = ("first_stage_model.", "vae.")
_T5 = ("text_encoders.t5xxl.",)
_CLIPS = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
}
_CLASSES: Mapping[str, type[Any]] = {  # no name of a folder is looked up elsewhere
    network.__name__: network for network in (AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)
}
_V_PREDICTION = "v_pred"  # an empty tensor by which a file says so
_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def convert(file: Path | str, folder: Path | str, *, config: Path | str) -> tuple[str, ...]:
    """Write a diffusers folder with the weights of a single-file checkpoint; return the parts that are the file's.

    The file has the denoiser, and often the autoencoder and text encoders, by the names of Stability AI's and Black
    Forest Labs' own code. The weights are read by diffusers' `from_single_file`, in the file's precision. All that is
    not there is copied from another model's folder: configurations, tokenizers, scheduler, and missing parts.

    Args:
        file: `.safetensors`; or `.ckpt`, a pickle, of which nothing but tensors is read.
        folder: The folder to write, which must not be there yet.
        config: A diffusers folder, or a Hub id, of the model that the file was made from.

    Raises:
        FileNotFoundError: there is no such file or no such model.
        FileExistsError: the folder is there.
        ValueError: the file cannot be read, or does not hold weights of such a model.
    """
    file, folder, source = Path(file).expanduser(), Path(folder).expanduser(), find_folder(config)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: name a new folder")
    checkpoint, index = _read(file), read_config(source / "model_index.json")
    family = family_of(source)
    if not issubclass(family, PipelineModel):
        raise ValueError(f"{config} is no model of images, so no single file holds its weights")
    _check_prediction(checkpoint, file, source)
    with outside_inference_mode():
        networks = _networks(checkpoint, index, family, file=file, source=source)
    try:
        for name, network in networks.items():
            network.save_pretrained(folder / name)
            shutil.copyfile(source / name / "config.json", folder / name / "config.json")  # of the model's own version
        for name, value in index.items():
            if isinstance(value, list) and name.isidentifier() and name not in networks and (source / name).is_dir():
                shutil.copytree(source / name, folder / name)
        shutil.copyfile(source / "model_index.json", folder / "model_index.json")
        load_model(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return tuple(networks)


def _read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by their names."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if file.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"{file} must be a .safetensors or .ckpt file")
    try:
        checkpoint = load_single_file_checkpoint(str(file))
    except Exception as error:  # whatever the libraries stumble over: the file is the only input
        hint = ", or a pickle of more than tensors, which is not opened" if file.suffix == ".ckpt" else ""
        raise ValueError(f"{file} cannot be read ({error}): it is damaged{hint}; take a .safetensors file") from error
    weights = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    quantised = [name for name in weights if name.endswith("weight") and weights[name].dtype not in _PRECISIONS]
    if quantised:
        raise ValueError(
            f"{file} is quantised ({quantised[0]} is {weights[quantised[0]].dtype}), with scales that are not "
            "understood: take the file in float16, bfloat16 or float32"
        )
    return weights


def _check_prediction(checkpoint: Mapping[str, Tensor], file: Path, source: Path) -> None:
    """Raise ValueError if a file says that it predicts v, and the model that gives its scheduler does not."""
    config = source / "scheduler" / "scheduler_config.json"
    if _V_PREDICTION in checkpoint and read_config(config).get("prediction_type") != "v_prediction":
        raise ValueError(
            f"{file} was trained to predict v ({_V_PREDICTION}), but {config} says otherwise: give a folder whose "
            'scheduler has prediction_type "v_prediction"'
        )


def _networks(
    checkpoint: Mapping[str, Tensor],
    index: Mapping[str, Any],
    family: type[PipelineModel],
    *,
    file: Path,
    source: Path,
) -> dict[str, Any]:
    """Return the networks whose weights are in a file, by their folders."""
    others = tuple(start for starts in (_VAE, _T5, *_CLIPS.values()) for start in starts)
    denoiser = {name: value for name, value in checkpoint.items() if name.startswith(_DENOISER)} or {
        name: value for name, value in checkpoint.items() if not name.startswith(others)
    }
    parts: dict[str, tuple[type, dict[str, Tensor]]] = {family.denoiser_folder: (family.network, denoiser)}
    file_of_parts = source / "model_index.json"
    for name in ("vae", *(part for part in index if part.startswith("text_encoder"))):
        if index.get(name) in (None, [None, None]):
            continue
        _, class_name = component(index, name, file_of_parts)
        if class_name not in _CLASSES:
            raise ValueError(f"{file_of_parts}: the {name} {class_name!r} is not understood: allowed are {[*_CLASSES]}")
        network = _CLASSES[class_name]
        starts = _VAE if network is AutoencoderKL else _T5 if network is T5EncoderModel else _CLIPS.get(name, ())
        weights = {key: value for key, value in checkpoint.items() if key.startswith(starts)}
        if weights:
            parts[name] = (network, weights)
    size = sum(value.numel() for value in denoiser.values())
    networks = {
        name: _network(network, weights, name, file=file, source=source) for name, (network, weights) in parts.items()
    }
    taken = sum(value.numel() for value in networks[family.denoiser_folder].state_dict().values())
    if taken != size:  # diffusers passes over names that it does not know
        reason = f"it has {size} numbers, the network {taken}"
        raise _misfit(file, source / family.denoiser_folder, reason)
    return networks


def _network(network: type[Any], weights: dict[str, Tensor], name: str, *, file: Path, source: Path) -> Any:
    """Return a network with a file's weights.

    Raises:
        ValueError: they are not all there, or of other shapes.
    """
    arguments = {"config": str(source), "subfolder": name, "local_files_only": True}
    try:
        if issubclass(network, ModelMixin):
            loaded = network.from_single_file(weights, **arguments)
        elif network is T5EncoderModel:
            loaded = create_diffusers_t5_model_from_checkpoint(network, weights, **arguments)
            loaded.tie_weights()
        else:
            loaded = create_diffusers_clip_model_from_ldm(network, weights, **arguments)
    except Exception as error:  # whatever the library stumbles over: it looks names up and hopes that they are there
        raise _misfit(file, source / name, f"{type(error).__name__}: {error}") from error
    missing = [key for key, value in loaded.state_dict().items() if value.is_meta]
    if missing:
        raise _misfit(file, source / name, f"{missing[0]} is missing")
    return loaded


def _misfit(file: Path, config: Path, reason: str) -> ValueError:
    return ValueError(
        f"{file} does not hold the weights of a network as {config / 'config.json'} describes it ({reason}): give the "
        "folder of the model that the file was made from, and of the same kind"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_gym.models.convert",
        description="Make a folder in diffusers' layout of a single-file checkpoint.",
    )
    parser.add_argument("file", help=".safetensors, or .ckpt, of which nothing but tensors is read")
    parser.add_argument("folder", help="the folder to write")
    parser.add_argument("--config", required=True, help="a diffusers folder or a Hub id of the model it was made from")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        parts = convert(args.file, args.folder, config=args.config)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.folder}: {', '.join(parts)} of {args.file}, all else of {args.config}")


if __name__ == "__main__":
    main()
