"""Weights from files: they are whole, or refused by an error that names the file and the weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_NAMED = 3
_SAMPLED = 32


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of all such files of a folder: a large network has several.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not whole ({error}): take another copy of it") from error
    return tensors


def require_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, file: Path, owner: str, origin: str = ""
) -> None:
    """Raise ValueError unless weights are those that are expected, all of them, of the same shapes and finite.

    Args:
        found: The weights of the file.
        expected: The weights that they are to replace.
        file: The file, for the message.
        owner: The network that takes them, for the message.
        origin: A further remark on their origin, for the message.
    """
    shared = [name for name in expected if name in weights]
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {list(weights[name].shape)} instead of {list(expected[name].shape)}"
            for name in shared
            if weights[name].shape != expected[name].shape
        ],
        "NaN or infinite": [name for name in shared if not bool(torch.isfinite(weights[name]).all())],
    }
    summary = "; ".join(
        f"{len(names)} are {problem} ({_listed(names)})" for problem, names in problems.items() if names
    )
    if summary:
        raise ValueError(f"{file} holds no weights for {owner}: of {len(expected)} weights {summary}{origin}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def sample_weights(network: nn.Module) -> list[float]:
    """Return a number from each of up to 32 of a network's matrices: the numbers tell networks of one shape apart."""
    matrices = [parameter.detach() for parameter in network.parameters() if parameter.ndim > 1]
    chosen = matrices[:: max(1, len(matrices) // _SAMPLED)][:_SAMPLED]
    return torch.stack([matrix.reshape(-1)[matrix.numel() // 2].float() for matrix in chosen]).tolist()


def is_same_sample(sample: Sequence[float], other: Sequence[float], *, is_rounded: bool) -> bool:
    """Return whether two samples of `sample_weights` are of one network, perhaps in another precision."""
    if not is_rounded:
        return list(sample) == list(other)
    return len(sample) == len(other) and torch.allclose(
        torch.tensor(sample), torch.tensor(other), rtol=2**-7, atol=1e-6
    )
