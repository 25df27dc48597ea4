"""LoRA files that open whole in diffusers' `load_lora_weights`, and in programs that read only names and alphas."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.loaders import FluxLoraLoaderMixin, SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .weights import read_weights, require_weights

_LORA_FILE = "pytorch_lora_weights.safetensors"
_UNET = "lora_unet_"
_TRANSFORMER = "transformer."
_METADATA = "lora_adapter_metadata"
_HALVES = {"lora_A": "lora_down", "lora_B": "lora_up"}


def _layers(denoiser: nn.Module) -> dict[str, Tensor]:
    """Return the LoRA layers, by peft's names: "<layer>.lora_A.weight", "<layer>.lora_B.weight"."""
    return get_peft_model_state_dict(denoiser, save_embedding_layers=False)


def _config(denoiser: nn.Module) -> LoraConfig:
    return next(iter(denoiser.peft_config.values()))  # type: ignore[operator]


def save_lora(denoiser: nn.Module, folder: Path) -> None:
    """Write a denoiser's LoRA layers by peft's names."""
    save_file(_layers(denoiser), folder / _LORA_FILE)


def load_lora(denoiser: nn.Module, folder: Path) -> None:
    """Read what `save_lora` wrote into a denoiser with LoRA layers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not just the denoiser's layers are in it, all of them finite.
    """
    _set(denoiser, read_weights(folder / _LORA_FILE), folder)


def _set(denoiser: nn.Module, layers: Mapping[str, Tensor], folder: Path) -> None:
    require_weights(layers, _layers(denoiser), file=folder / _LORA_FILE, owner="this denoiser's LoRA layers")
    set_peft_model_state_dict(denoiser, dict(layers))


def save_unet_lora(denoiser: nn.Module, folder: Path) -> None:
    """Write a UNet's LoRA layers by kohya-ss's names, with an alpha for each layer.

    Programs that do not read diffusers' metadata read these names, and so does diffusers itself, for all layers. (Its
    own files name attention's layers one way and all others another, and it reads only one of the two.) Where the
    installed diffusers does not know kohya-ss's name of a layer, the file has peft's names, and the alpha stands in its
    metadata.
    """
    layers = _layers(denoiser)
    named = _kohya(layers, _config(denoiser).lora_alpha)
    read, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(named))
    if _from_diffusers(read).keys() == layers.keys():
        save_file(named, folder / _LORA_FILE)
    else:
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            folder, unet_lora_layers=layers, unet_lora_adapter_metadata=_config(denoiser).to_dict()
        )


def load_unet_lora(denoiser: nn.Module, folder: Path) -> None:
    """Read what `save_unet_lora` wrote, or a file by diffusers' names; the errors are those of `load_lora`."""
    file = folder / _LORA_FILE
    weights = read_weights(file)
    if not any(name.startswith(_UNET) for name in weights):
        return _set(denoiser, _from_diffusers(weights), folder)
    expected = _kohya(_layers(denoiser), _config(denoiser).lora_alpha)
    require_weights(weights, expected, file=file, owner="this denoiser's LoRA layers")
    _check_alphas({float(weights[name]) for name in weights if name.endswith(".alpha")}, denoiser, file)
    names = {_kohya_name(name): name for name in _layers(denoiser)}
    return _set(denoiser, {names[name]: weights[name] for name in weights if name in names}, folder)


def _check_alphas(alphas: set[float], denoiser: nn.Module, file: Path) -> None:
    """Raise ValueError unless a file's alphas are all that of a denoiser's LoRA layers."""
    alpha = _config(denoiser).lora_alpha
    if alphas != {float(torch.tensor(alpha, dtype=torch.float32))}:
        raise ValueError(f"{file} has lora_alpha {sorted(alphas)}, this denoiser's LoRA layers {alpha}")


def save_transformer_lora(
    denoiser: nn.Module, folder: Path, pipeline: type[SD3LoraLoaderMixin] | type[FluxLoraLoaderMixin]
) -> None:
    """Write a transformer's LoRA layers as diffusers does: by peft's names, and the alpha in the file's metadata."""
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=_layers(denoiser),
        transformer_lora_adapter_metadata=_config(denoiser).to_dict(),
    )


def load_transformer_lora(denoiser: nn.Module, folder: Path) -> None:
    """Read what `save_transformer_lora` wrote; the errors are those of `load_lora`."""
    file = folder / _LORA_FILE
    weights = read_weights(file)
    with safe_open(file, "pt") as opened:
        settings = json.loads((opened.metadata() or {}).get(_METADATA, "{}"))
    if f"{_TRANSFORMER}lora_alpha" in settings:
        _check_alphas({float(settings[f"{_TRANSFORMER}lora_alpha"])}, denoiser, file)
    _set(denoiser, {name.removeprefix(_TRANSFORMER): weight for name, weight in weights.items()}, folder)


def _kohya_name(name: str) -> str:
    layer, half, kind = name.rsplit(".", 2)
    return f"{_UNET}{layer.replace('.', '_')}.{_HALVES[half]}.{kind}"


def _kohya(layers: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return the layers by kohya-ss's names, "lora_unet_<layer_with_underscores>.lora_down.weight", with alphas."""
    named = {_kohya_name(name): tensor.contiguous() for name, tensor in layers.items()}
    alphas = {f"{name.partition('.')[0]}.alpha": torch.tensor(float(alpha), dtype=torch.float32) for name in named}
    return named | alphas


def _from_diffusers(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return convert_unet_state_dict_to_peft({name.removeprefix("unet."): layers[name] for name in layers})
