"""`load_model`: a diffusion model of a name, a folder or a Hub id."""

import importlib
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ..naming import did_you_mean
from . import sharding
from .base import DiffusionModel, ImageSize, Origin, outside_inference_mode, to_device, to_dtype
from .folders import read_config, single_file_pipeline

_PACKAGED = {"emoji": 4.0, "emoji_flow": 4.0, "emoji_consistency": 4.0, "mixture": 1.0}
# A new family is a file and a line here: its pipeline's class, its own, and in words which models that is.
_FAMILIES = {
    "StableDiffusionPipeline": ("stable_diffusion:StableDiffusionModel", "Stable Diffusion 1.x, 2.x"),
    "StableDiffusionXLPipeline": ("stable_diffusion_xl:StableDiffusionXLModel", "Stable Diffusion XL"),
    "LatentConsistencyModelPipeline": ("latent_consistency:LatentConsistencyModel", "latent consistency models"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3:StableDiffusion3Model", "Stable Diffusion 3, 3.5"),
    "FluxPipeline": ("flux:FluxModel", "Flux.1"),
    "ConsistencyModelPipeline": ("consistency_model:ConsistencyModel", "consistency models in pixels"),
    "MixturePipeline": ("mixture:MixtureModel", "of write_mixture"),
    "ConsistencyMixturePipeline": ("consistency_mixture:ConsistencyMixtureModel", "of write_consistency_mixture"),
}


def find_folder(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    without: Sequence[str] = (),
) -> Path:
    """Return the diffusers folder behind a name, a folder or a Hub id; a Hub's model is downloaded to its cache."""
    if source in _PACKAGED:
        return Path(str(files(__package__) / str(source)))
    folder = Path(source).expanduser().absolute()
    if (folder / "model_index.json").is_file():
        return folder
    if folder.is_file() or str(source).endswith((".safetensors", ".ckpt")):
        pipeline = single_file_pipeline(folder)
        raise FileNotFoundError(
            f"{folder} is a single file, as of a {pipeline}, with neither configurations nor tokenizers: `python -m "
            f"diffusion_gym.models.convert {str(source)!r} FOLDER --config MODEL` makes a folder of it, where MODEL is "
            "the folder or Hub id of the model that it was made from"
        )
    if folder.exists():
        raise FileNotFoundError(f"{folder} is not a diffusers folder: it has no model_index.json")
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"unknown model {str(source)!r}: there is no folder {folder}.{did_you_mean(source, _PACKAGED)} "
            f"Give {', '.join(map(repr, _PACKAGED))}, a diffusers folder, or a Hub id owner/name."
        )
    from diffusers import DiffusionPipeline

    try:
        return Path(
            DiffusionPipeline.download(
                str(source), revision=revision, variant=variant, trust_remote_code=False, **dict.fromkeys(without)
            )
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no folder {str(source)!r} here, and the Hugging Face Hub did not give a model of that id ({error}). "
            f"Give {', '.join(map(repr, _PACKAGED))}, which come with the package, or the path of a diffusers folder."
        ) from error


def load_model(
    source: str | os.PathLike[str] = "emoji",
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    image_size: ImageSize | None = None,
    revision: str | None = None,
    variant: str | None = None,
    without: Sequence[str] = (),
    offload: bool = False,
    text_encoder_dtype: str | torch.dtype = "float32",
) -> DiffusionModel:
    """Return a diffusion model; its networks load when they are first needed.

    The folder is checked at once, as far as it can be without reading the weights.

    Args:
        source: "emoji", "emoji_flow", "emoji_consistency" or "mixture", which come with the package and work offline
            (64×64 emoji by diffusion, by flow matching, and in few steps; a Gaussian mixture of which everything is
            known), a folder in diffusers'
            layout, or a Hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5". The family is read from
            `model_index.json`. Of a single file (`.safetensors`, `.ckpt`), which has neither configurations nor
            tokenizers, `python -m diffusion_gym.models.convert` makes such a folder.
        device: A torch device.
        dtype: The frozen denoiser's precision.
        image_size: Height and width in pixels, or one number for both; None: what the model was trained on.
        revision: The Hub's branch, tag or commit.
        variant: The variant of the files of weights, such as "fp16" for `model.fp16.safetensors`;
            a network that has no such file is read from its plain one.
        without: The parts of the folder that are left out, as the model's pipeline can: ("text_encoder_3",) is Stable
            Diffusion 3 without T5, its largest text encoder.
        offload: Keep the text encoders and the autoencoder in the CPU's memory, and lend them to the device for each
            use.
        text_encoder_dtype: The text encoders' precision. "bfloat16" halves their memory (T5-XXL: 19 GB to 9.5); their
            embeddings, float32 in any case, are then good to about 1 %.

    Raises:
        FileNotFoundError: there is no such model, or its folder is not whole.
        TypeError: `source` is none of these, `without` no sequence of names, or `offload` not True or False.
        ValueError: its family is not supported, its folder holds something that is not understood, or `image_size`,
            `dtype`, `device`, `variant`, `without`, `offload` or `text_encoder_dtype` cannot be had.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"the model must be a name, a diffusers folder or a Hub id, got {source!r}")
    if variant is not None and (not isinstance(variant, str) or not variant):
        raise ValueError(f'variant must be None or a name such as "fp16", got {variant!r}')
    if isinstance(without, str) or not all(isinstance(part, str) for part in without):
        raise TypeError(f'without must be a sequence of names, such as ("text_encoder_3",); got {without!r}')
    if not isinstance(offload, bool):
        raise TypeError(f"offload must be True or False, got {offload!r}")
    path = find_folder(source, revision=revision, variant=variant, without=without)
    is_folder = source not in _PACKAGED and Path(source).expanduser().absolute() == path
    origin = Origin(
        str(path) if is_folder else os.fspath(source),
        path,
        device=to_device(device),
        dtype=to_dtype(dtype),
        text_encoder_dtype=to_dtype(text_encoder_dtype, "text_encoder_dtype"),
        image_size=image_size,
        revision=revision,
        variant=variant,
        without=tuple(without),
        offload=offload,
    )
    return _open(origin)


def reload_model(origin: Origin, settings: dict[str, Any]) -> DiffusionModel:
    """Return the model of a pickle: of its folder on this machine, or of the package, which may lie elsewhere now."""
    path = find_folder(origin.source) if origin.source in _PACKAGED else origin.path
    model = _open(replace(origin, path=path, device=to_device(origin.device)))
    for name, value in settings.items():
        setattr(model, name, value)
    return model


def family_of(path: Path) -> type[DiffusionModel]:
    """Return the class for a diffusers folder.

    Raises:
        FileNotFoundError, ValueError: its `model_index.json` names none that is supported.
    """
    class_name = read_config(path / "model_index.json").get("_class_name")
    if not isinstance(class_name, str) or class_name not in _FAMILIES:
        supported = " and ".join(f"{pipeline} ({words})" for pipeline, (_, words) in _FAMILIES.items())
        raise ValueError(
            f"{path / 'model_index.json'}: {class_name!r} is no family of models here: supported are {supported}"
        )
    module, _, name = _FAMILIES[class_name][0].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def _open(origin: Origin) -> DiffusionModel:
    """Return the model of a folder."""
    source, family = origin.source, family_of(origin.path)
    for part in origin.without:
        if part not in family.optional_parts:
            allowed = ", ".join(family.optional_parts) or "none"
            raise ValueError(f"without={part!r}: no part that {source!r} can do without, which are: {allowed}")
    if not family.has_text_encoders:
        if origin.offload:
            raise ValueError(
                f"offload=True has no effect: {source!r} has no text encoder and no autoencoder; leave it out"
            )
        if origin.text_encoder_dtype != torch.float32:
            raise ValueError(
                f"text_encoder_dtype={origin.text_encoder_dtype} has no effect: {source!r} has no text encoder; leave "
                "it out"
            )
    with outside_inference_mode():
        model = family(origin)
    if source in _PACKAGED:
        model.default_guidance_scale = _PACKAGED[source]
    model.is_sharded = sharding.is_asked_for()
    return model
