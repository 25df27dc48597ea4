"""What the rewards have in common that a pretrained network gives."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import nn

from .base import Metadata, Reward, RewardOutput

T = TypeVar("T")


class ModelReward(Reward):
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
    def load(self) -> nn.Module:
        """Return the network, from its files."""

    @abstractmethod
    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> RewardOutput:
        """Return the rewards of at most `batch_size` images, which are on the network's device."""

    @cached_property
    def network(self) -> nn.Module:
        """The frozen network."""
        return self.load().to(self.device, self.dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(  # noqa: D102
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
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


def pretrained(load: Callable[[str], T], source: str, *, what: str, keyword: str) -> T:
    """Return `load(source)`, a folder's or the Hub's.

    Args:
        load: A `from_pretrained`, or what else opens the source.
        source: A folder, a file or an id on the Hugging Face Hub.
        what: What it is, for the error: "CLIP ViT-L/14".
        keyword: The reward's keyword that names the source.

    Raises:
        ValueError: it could not be had; says what is needed and how to name a local copy.
    """
    try:
        return load(source)
    except OSError as error:
        raise ValueError(
            f"{what} could not be loaded from {source!r}: there is no such folder here, and the Hugging Face Hub did "
            f"not give it ({error}). Fetch it where there is a network, for example with `hf download {source}`, "
            f"and name the folder: {keyword}=..."
        ) from error
