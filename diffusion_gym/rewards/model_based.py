"""The base of the rewards that a pretrained network gives, and functions that load one."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors.torch import load_file
from torch import nn
from typing_extensions import override

from ..checks import checked_integer
from ..loading import hub_answers
from .base import Metadata, Reward, RewardOutput, check_prompts

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class ModelReward(Reward, Generic[Network]):
    """A reward that a frozen network gives: called in chunks, without gradients.

    Its files are fetched when `make_reward` or an environment makes it (`make_ready`), and read at the first call.

    Args:
        device: The network's device, "cuda:1" for example; None: that of the first images.
        dtype: The type that the network computes in; rewards are float32 whatever it is.
        batch_size: The most images per call of the network.

    Raises:
        ValueError: `batch_size` is not positive, or there is no such device.
    """

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        self.device = None if device is None else checked_device(device)
        self.dtype = dtype
        self.batch_size = checked_integer("batch_size", batch_size, at_least=1)

    @abstractmethod
    def load(self) -> Network:
        """Return the network, from its files."""

    @abstractmethod
    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> RewardOutput:
        """Return the rewards of at most `batch_size` images, which are on the network's device."""

    @cached_property
    def network(self) -> Network:
        """The frozen network."""
        with torch.inference_mode(False), torch.no_grad():
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
        """Load what the reward needs beside its network; it comes first, for it is small and may be missing."""

    @torch.no_grad()
    @override
    def __call__(
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
        extras = {name: torch.cat([output.extras[name].float() for output in outputs]) for name in outputs[0].extras}
        return RewardOutput(values.to(images.device), {name: extra.to(images.device) for name, extra in extras.items()})


def checked_device(device: torch.device | str) -> torch.device:
    """Return the torch device, without using it.

    Raises:
        ValueError: it is a CUDA device that is not there.
    """
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {str(device)!r}: {torch.cuda.device_count()} CUDA devices are here")
    return device


def pretrained(load: Callable[..., T], source: str | Path, *, what: str, keyword: str) -> T:
    """Return `load(source)`, from a folder or from the Hub; where the Hub does not answer, from its cache.

    Args:
        load: A `from_pretrained`, or the like; it gets `local_files_only=True` without the Hub.
        source: A folder, a file or an id on the Hugging Face Hub ("owner/name", or "owner/name/file" for a file).
        what: The thing's name, for the error: "CLIP ViT-L/14".
        keyword: The reward's keyword that names the source.

    Raises:
        ValueError: it could not be had; says what is needed and how to name a local copy.
    """
    source = str(source)
    without_hub = not Path(source).exists() and not hub_answers()
    try:
        return load(source, local_files_only=True) if without_hub else load(source)
    except (OSError, HFValidationError) as error:
        owner, _, rest = source.partition("/")
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if without_hub:
            reason += "; it does not answer, or HF_HUB_OFFLINE says not to ask"
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
        what: The checkpoint's name, for the errors.
        keyword: The reward's keyword that names the source.
        sha256: The SHA-256 that the file must have; None: it is not checked.

    Raises:
        ValueError: the file could not be had, or it is another one.
    """
    path = pretrained(_find_file, source, what=what, keyword=keyword)
    if sha256 is not None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != sha256.lower():
            raise ValueError(
                f"{path} is not the expected file of {what}: its SHA-256 is {digest}, expected {sha256}. Fetch it "
                f"again, or, if it is meant, give {keyword}_sha256={digest!r}"
            )
    if path.suffix == ".safetensors":
        return load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return weights.get("state_dict", weights)


def fetch_file(source: str | Path, *, what: str, keyword: str) -> None:
    """Fetch a checkpoint's file to this machine, as `read_weights` reads it.

    Raises:
        ValueError: it could not be had.
    """
    pretrained(_find_file, source, what=what, keyword=keyword)


def fetch_model(source: str | Path, *, what: str, keyword: str) -> None:
    """Fetch the weights of a model of transformers to this machine, as its `from_pretrained` reads them.

    Raises:
        ValueError: they could not be had.
    """
    pretrained(_find_weights, source, what=what, keyword=keyword)


def _find_weights(source: str, *, local_files_only: bool = False) -> None:
    for name in _WEIGHTS:
        path = _find_in(source, name, local_files_only=local_files_only)
        if path is None:
            continue
        parts = set(json.loads(path.read_text())["weight_map"].values()) if name.endswith(".json") else ()
        for part in sorted(parts):
            if _find_in(source, part, local_files_only=local_files_only) is None:
                raise FileNotFoundError(f"{source} has no {part}, which its {name} names")
        return
    raise FileNotFoundError(f"{source} has none of {', '.join(_WEIGHTS)}")


def _find_in(source: str, name: str, *, local_files_only: bool) -> Path | None:
    """Return the path of a folder's file, or of a Hub id's in the cache; None: there is none."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        cached = try_to_load_from_cache(source, name)
        return Path(
            cached if isinstance(cached, str) else hf_hub_download(source, name, local_files_only=local_files_only)
        )
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise FileNotFoundError(f"{source} is neither a folder nor an id on the Hub") from error


def _find_file(source: str, *, local_files_only: bool = False) -> Path:
    """Return the file's path: a local one's, or the Hub's in its cache."""
    if Path(source).is_file():
        return Path(source)
    owner, name, file = [*source.split("/", 2), "", ""][:3]
    if not (owner and name and file):
        raise FileNotFoundError(f"{source!r} is neither a file nor owner/name/file on the Hub")
    path = _find_in(f"{owner}/{name}", file, local_files_only=local_files_only)
    if path is None:
        raise FileNotFoundError(f"there is no file {file!r} of {owner}/{name} that could be had")
    return path


def fill(network: nn.Module, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Copy a checkpoint's tensors into a network; the checkpoint's other tensors are ignored.

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
