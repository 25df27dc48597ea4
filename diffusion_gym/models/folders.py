"""Checks of diffusers' folders: the configurations, and that the weights beside them are there, whole and in shape.

The headers of the files say all that is needed: no weights are read.
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

_PICKLED = {"model": "pytorch_model"}  # transformers' names
_SINGLE_FILES = {  # by how a tensor's name begins
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "joint_blocks.": "StableDiffusion3Pipeline",
    "double_blocks.": "FluxPipeline",
}
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def read_config(file: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}: the model's folder is not whole")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}")
    return config


def find_weights(folder: Path, stem: str, variant: str | None) -> tuple[Path, str | None]:
    """Return a network's file of weights (or the index of its parts) and the file's variant, None for the plain file.

    Args:
        folder: The network's folder.
        stem: The file's name without variant and ending.
        variant: Such as "fp16", for `stem.fp16.safetensors`.

    Raises:
        FileNotFoundError: there is none.
    """
    for chosen in dict.fromkeys((variant, None)):
        middle = "" if chosen is None else f".{chosen}"
        for kind, name in ((".safetensors", stem), (".bin", _PICKLED.get(stem, stem))):
            for file in (folder / f"{name}{middle}{kind}", folder / f"{name}{kind}.index{middle}.json"):
                if file.is_file():
                    return file, chosen
    present = sorted(file.name for file in folder.glob(f"{stem}.*")) if folder.is_dir() else []
    parts = (name.removeprefix(f"{stem}.").split(".")[0] for name in present)
    variants = sorted({part.split("-")[0] for part in parts} - {"safetensors", "bin"})
    cure = f'; load_model(…, variant="{variants[0]}") takes {present[0]}' if variants else ""
    asked = "" if variant is None else f" and no {stem}.{variant}.safetensors"
    raise FileNotFoundError(f"{folder} has no {stem}.safetensors (or .bin){asked}{cure}")


def single_file_pipeline(file: Path) -> str:
    """Return the name of the diffusers pipeline that a single-file checkpoint is of, by its tensors' names."""
    try:
        with safe_open(file, "pt") as weights:
            names = [name.removeprefix("model.diffusion_model.") for name in weights.keys()]  # noqa: SIM118
    except (SafetensorError, OSError):  # not there, or pickled, and a pickle is not opened for this
        names = []
    pipelines = (pipeline for start, pipeline in _SINGLE_FILES.items() if any(name.startswith(start) for name in names))
    return next(pipelines, "StableDiffusionPipeline")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if file.name.endswith(".json"):
        parts = read_config(file).get("weight_map")
        if not isinstance(parts, dict):
            raise ValueError(f"{file} has no weight_map")
        missing = sorted({str(name) for name in parts.values() if not (file.parent / str(name)).is_file()})
        if missing:
            raise FileNotFoundError(f"{file.parent} has no {missing[0]}, which {file.name} names")
        return {key: shape for name in set(parts.values()) for key, shape in _shapes(file.parent / name).items()}
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                return {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
        tensors = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        return {key: tuple(value.shape) for key, value in tensors.items()}
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: it is cut off, or no file of weights ({error})") from error


def empty_network(build: Callable[[], nn.Module], config: Path) -> nn.Module:
    """Return the network that a configuration describes, without memory for its weights.

    Raises:
        ValueError: it describes none.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            return build()
    except Exception as error:  # whatever the library stumbles over: the configuration is the only input
        raise ValueError(
            f"{config} does not describe a network that can be built ({type(error).__name__}: {error}): restore the "
            "file that came with the weights"
        ) from error


def check_weights(network: nn.Module, weights: Path, *, prefix: str = "") -> None:
    """Check that a file holds all parameters of a network, in their shapes, and no tables of other shapes.

    Args:
        network: A network, such as `empty_network` returns.
        weights: The file that `find_weights` returned.
        prefix: A prefix that parameters' names may have in the file.

    Raises:
        FileNotFoundError, ValueError: it does not.
    """
    shapes: Mapping[str, tuple[int, ...]] = {key.removeprefix(prefix): shape for key, shape in _shapes(weights).items()}
    names: dict[int, list[str]] = {}  # of one parameter: T5's embedding has two, and files have either
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.removeprefix(prefix))
    for parameter in network.parameters():
        name, *further_names = names[id(parameter)]
        old_name = name
        for before, after in _OLD_ATTENTION.items():
            old_name = old_name.replace(after, before)
        shape = next((shapes[key] for key in (name, old_name, *further_names) if key in shapes), None)
        if shape is None:
            raise ValueError(
                f"{weights} lacks {name}, which config.json beside it describes: the two do not belong together"
            )
        _check_shape(name, shape, tuple(parameter.shape), weights)
    tensors = network.state_dict()
    for name in tensors.keys() & shapes.keys():  # tables among them, such as of positions
        _check_shape(name, shapes[name], tuple(tensors[name].shape), weights)


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], weights: Path) -> None:
    if shape != expected:
        raise ValueError(
            f"{weights} holds {name} of shape {list(shape)}, config.json beside it describes {list(expected)}: the two "
            "do not belong together"
        )
