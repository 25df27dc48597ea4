"""LoRA files that open whole in diffusers' `load_lora_weights`, and in programs that read only names and alphas."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from .weights import read_weights, require_weights

_LORA_FILE = "pytorch_lora_weights.safetensors"
_UNET = "lora_unet_"
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
    alpha = _config(denoiser).lora_alpha
    expected = _kohya(_layers(denoiser), alpha)
    require_weights(weights, expected, file=file, owner="this denoiser's LoRA layers")
    alphas = {float(weights[name]) for name in weights if name.endswith(".alpha")}
    if alphas != {float(torch.tensor(alpha, dtype=torch.float32))}:
        raise ValueError(f"{file} has lora_alpha {sorted(alphas)}, this denoiser's LoRA layers {alpha}")
    names = {_kohya_name(name): name for name in _layers(denoiser)}
    return _set(denoiser, {names[name]: weights[name] for name in weights if name in names}, folder)


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
