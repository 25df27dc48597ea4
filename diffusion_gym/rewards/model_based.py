"""What the rewards have in common that a pretrained network gives."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import cached_file

from .base import Metadata, Reward, RewardOutput, check_prompts

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)


class ModelReward(Reward, Generic[Network]):
    """A reward that a frozen network gives: loaded when it is first asked, called in chunks, without gradients.

    Args:
        device: Where the network lives, "cuda:1" for example; None: where the first images are.
        dtype: The type that the network computes in; rewards are float32 whatever it is.
        batch_size: The most images per call of the network.

    Raises:
        ValueError: `batch_size` is not positive.
    """

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        self.batch_size = batch_size

    @abstractmethod
    def load(self) -> Network:
        """Return the network, from its files."""

    @abstractmethod
    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> RewardOutput:
        """Return the rewards of at most `batch_size` images, which are on the network's device."""

    @cached_property
    def network(self) -> Network:
        """The frozen network."""
        return self.load().to(self.device, self.dtype).eval().requires_grad_(False)

    def load_all(self) -> None:
        """Load now what the first call would load.

        Raises:
            ValueError: `device` is None, or something cannot be had.
        """
        if self.device is None:
            raise ValueError(f"to load {self.name} before it sees an image, say where it is to live: device=...")
        self.load_rest()
        self.network  # noqa: B018

    def load_rest(self) -> None:
        """Load what the reward needs beside its network: first, for it is the smaller part to find missing."""

    @torch.no_grad()
    def __call__(  # noqa: D102
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        check_prompts(images, prompts)
        if self.device is None:
            self.device = images.device
        outputs = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            chunk = images[part].to(self.device)
            outputs.append(self.score(chunk, prompts[part], None if metadata is None else metadata[part]))
        values = torch.cat([output.values.float() for output in outputs])
        extras = {name: torch.cat([output.extras[name] for output in outputs]) for name in outputs[0].extras}
        return RewardOutput(values.to(images.device), {name: one.to(images.device) for name, one in extras.items()})


def pretrained(load: Callable[[str], T], source: str | Path, *, what: str, keyword: str) -> T:
    """Return `load(source)`, a folder's or the Hub's.

    Args:
        load: A `from_pretrained`, or what else opens the source.
        source: A folder, a file or an id on the Hugging Face Hub ("owner/name", or "owner/name/file" for a file).
        what: What it is, for the error: "CLIP ViT-L/14".
        keyword: The reward's keyword that names the source.

    Raises:
        ValueError: it could not be had; says what is needed and how to name a local copy.
    """
    source = str(source)
    try:
        return load(source)
    except OSError as error:
        owner, _, rest = source.partition("/")
        reason = (str(error) or type(error).__name__).splitlines()[0]
        fetch = f", for example with `hf download {owner}/{rest.replace('/', ' ', 1)}`," if owner and rest else ""
        raise ValueError(
            f"{what} could not be loaded from {source!r}: there is no such file or folder here, and the Hugging Face "
            f"Hub did not give it ({reason}). Fetch it where there is a network{fetch} and name "
            f"the local copy: {keyword}=..."
        ) from error


def read_weights(source: str | Path, *, what: str, keyword: str, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by name, on the CPU, without executing anything that stands in it.

    Args:
        source: A file, or "owner/name/file" on the Hugging Face Hub: `.safetensors`, or what `torch.save` wrote, of
            which only tensors are read (`weights_only=True`). Tensors under the key "state_dict" are found there.
        what: What it is, for the errors.
        keyword: The reward's keyword that names the source.
        sha256: What the file's SHA-256 must be; None: it is not checked.

    Raises:
        ValueError: the file could not be had, or it is another one.
    """
    path = pretrained(_find_file, source, what=what, keyword=keyword)
    if sha256 is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256.lower():
            raise ValueError(
                f"{path} is not the expected file of {what}: its SHA-256 is {found}, expected {sha256}. Fetch it "
                f"again, or, if it is meant, give {keyword}_sha256={found!r}"
            )
    if path.suffix == ".safetensors":
        return load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return weights.get("state_dict", weights)


def _find_file(source: str) -> Path:
    """Return the file's path: a local one's, or the Hub's in its cache."""
    if Path(source).is_file():
        return Path(source)
    owner, name, file = [*source.split("/", 2), "", ""][:3]
    if not (owner and name and file):
        raise FileNotFoundError(f"{source!r} is neither a file nor owner/name/file on the Hub")
    return Path(cached_file(f"{owner}/{name}", file))


def fill(network: nn.Module, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Copy a checkpoint's tensors into a network; what else is in the checkpoint is passed over.

    Raises:
        ValueError: one of the network's tensors is not in the checkpoint, or has another shape there.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise ValueError(
            f"{source} is not a checkpoint of this reward: {len(missing)} of the {len(wanted)} tensors that the "
            f"network needs are not in it, for example {missing[0]!r}; it has {sorted(weights)[:3]} ..."
        )
    for name, tensor in wanted.items():
        if weights[name].shape != tensor.shape:
            shapes = f"{tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
            raise ValueError(f"{source} is not a checkpoint of this reward: {name!r} has the shape {shapes}")
    network.load_state_dict({name: weights[name] for name in wanted})
