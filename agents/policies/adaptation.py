"""What a policy trains of a diffusion model's denoiser: all weights, some of them, or LoRA layers."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from diffusion_gym.checks import checked_integer, checked_number
from diffusion_gym.models import sharding
from diffusion_gym.models.base import DiffusionModel
from diffusion_gym.models.weights import read_weights, require_weights
from diffusion_gym.parts import Part


class Adaptation(Part, ABC):
    """How a network is made from a model's frozen denoiser, to be trained, saved and loaded.

    Attributes:
        over_another_model: What the trained weights are worth over another model's than they were trained on.
        is_whole: What is saved is a whole network, and not layers that go over another one.
    """

    over_another_model: str
    is_whole: bool = False

    def resolved(self, model: DiffusionModel) -> "Adaptation":
        """The same adaptation, with the model's choices in the place of what was left to it."""
        return self

    @abstractmethod
    def network(self, model: DiffusionModel, generator: torch.Generator) -> nn.Module:
        """A network of the policy's own that starts as the model's denoiser; what is trained of it requires gradients.

        Args:
            model: The diffusion model; its denoiser does not change.
            generator: Where first weights are drawn from.
        """

    @abstractmethod
    def reference(self, model: DiffusionModel) -> nn.Module:
        """The untrained network, frozen, in the precision that the trained one computes in."""

    @abstractmethod
    def arithmetic(self, model: DiffusionModel) -> torch.dtype:
        """The precision that the network computes in where there is no autocast."""

    @abstractmethod
    def save(self, network: nn.Module, folder: Path, *, model: DiffusionModel) -> None:
        """Write the trained weights as diffusers loads them."""

    @abstractmethod
    def load(self, network: nn.Module, folder: Path, *, model: DiffusionModel, trained_on: str) -> None:
        """Read what `save` wrote into a network of the same adaptation.

        Args:
            network: What `network` returned.
            folder: What `save` was given.
            model: The diffusion model of the network.
            trained_on: The source of the model that the weights were trained on, for the error.

        Raises:
            ValueError: its weights are not all there, of another shape, NaN or infinite, or a file is damaged.
        """

    @abstractmethod
    def reads(self, saved: "Adaptation") -> bool:
        """Whether what a policy with a (resolved) adaptation saved can be read into one with this."""


class _Copy(Adaptation):
    """A float32 copy of the whole denoiser, some or all of whose weights are trained: they are saved the same."""

    over_another_model = "its gain is over another one"
    is_whole = True

    @abstractmethod
    def is_trained(self, name: str) -> bool:
        """Whether the weight of this name is trained."""

    def network(self, model: DiffusionModel, generator: torch.Generator) -> nn.Module:
        """A float32 copy of the model's denoiser."""
        network = copy.deepcopy(model.denoiser).float()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(self.is_trained(name))
        return network

    def reference(self, model: DiffusionModel) -> nn.Module:
        """The model's own weights, at no cost in memory; a copy where they are of lower precision than float32."""
        return _sharing(model.denoiser) if model.dtype == torch.float32 else copy.deepcopy(model.denoiser).float()

    def arithmetic(self, model: DiffusionModel) -> torch.dtype:
        """That of the copy, float32."""
        return torch.float32

    def save(self, network: nn.Module, folder: Path, *, model: DiffusionModel) -> None:
        """Write the whole network in diffusers' format, such as `unet/`.

        Processes that share its weights have to call it all; the main one writes.
        """
        whole = sharding.whole_network(network)
        if whole is not None:
            whole.save_pretrained(folder / model.denoiser_folder)  # type: ignore[operator]

    def load(self, network: nn.Module, folder: Path, *, model: DiffusionModel, trained_on: str) -> None:
        """Read the whole network."""
        file = folder / model.denoiser_folder
        weights = read_weights(file) if file.is_dir() else {}
        owner, origin = f"a policy of the model {model.source!r}", f"; it was saved from one of {trained_on!r}"
        require_weights(weights, network.state_dict(), file=file, owner=owner, origin=origin)
        sharding.load_weights(network, weights)

    def reads(self, saved: Adaptation) -> bool:
        """Whether it is a whole network too, whatever was trained of it."""
        return isinstance(saved, _Copy)


@dataclass(frozen=True)
class Full(_Copy):
    """Train all weights of a copy of the denoiser."""

    def is_trained(self, name: str) -> bool:
        """All are."""
        return True


@dataclass(frozen=True, init=False)
class Only(_Copy):
    """Train only the weights of a copy whose names contain one of these parts: `Only("bias", "norm", "time_emb")`.

    Args:
        names: The parts of names.

    Raises:
        TypeError, ValueError: they are not texts, or there are none.
    """

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f'Only takes parts of names, such as Only("bias", "norm"); got {names!r:.200}')
        if not all(names) or not names:
            raise ValueError(f'Only needs parts of names, such as Only("bias", "norm"), got {names!r}: all is Full()')
        object.__setattr__(self, "names", names)

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> "Only":
        """The part whose fields have these values."""
        return cls(*values["names"])

    def is_trained(self, name: str) -> bool:
        """Whether the name contains one of the parts."""
        return any(part in name for part in self.names)


@dataclass(frozen=True)
class LoRA(Adaptation):
    """Train low-rank layers over the frozen denoiser, whose weights are shared with the model and not copied.

    W + (alpha/rank)·B·A, with A of `rank` rows drawn as peft does, and B zero.

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685.

    Args:
        rank: The rank of the layers, at least 1 (ddpo-pytorch: 4).
        alpha: Their scale, positive; None: the rank.
        targets: The names of the layers that are adapted; None: the model's attention projections.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its range.
    """

    over_another_model = "its LoRA layers mean something else here"

    rank: int = 4
    alpha: float | None = None
    targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checked_integer("rank", self.rank, at_least=1))
        if self.alpha is not None:
            object.__setattr__(self, "alpha", checked_number("alpha", self.alpha, "(0, inf)"))
        if self.targets is None:
            return
        if isinstance(self.targets, str) or not all(isinstance(name, str) for name in self.targets):
            raise TypeError(
                f"targets must be a sequence of names of layers, such as ('to_q', 'to_v'); got {self.targets!r}"
            )
        if not self.targets:
            raise ValueError("targets must name at least one layer, got none: give None for the model's own")
        object.__setattr__(self, "targets", tuple(self.targets))

    def resolved(self, model: DiffusionModel) -> "LoRA":
        """With the rank for an alpha that was not given, and the model's layers for targets that were not."""
        if not model.lora_targets:
            raise ValueError(f"diffusers reads no LoRA layers of {model.source!r}: train Full() or Only(…)")
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return replace(self, alpha=alpha, targets=model.lora_targets if self.targets is None else self.targets)

    def network(self, model: DiffusionModel, generator: torch.Generator) -> nn.Module:
        """The model's denoiser with layers beside it, in float32."""
        complete = self.resolved(model)
        assert complete.targets is not None
        config = LoraConfig(r=self.rank, lora_alpha=complete.alpha, target_modules=list(complete.targets))
        network = _sharing(model.denoiser)
        with torch.random.fork_rng(devices=[]):  # peft draws first weights, which `_start` replaces
            network.add_adapter(config)  # type: ignore[operator]
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        _start(network, generator)
        return network

    def reference(self, model: DiffusionModel) -> nn.Module:
        """The model's own weights, at no cost in memory."""
        return _sharing(model.denoiser)

    def arithmetic(self, model: DiffusionModel) -> torch.dtype:
        """That of the frozen weights."""
        return model.dtype

    def save(self, network: nn.Module, folder: Path, *, model: DiffusionModel) -> None:
        """Write a LoRA file for diffusers' `load_lora_weights`."""
        model.save_lora(network, folder)

    def load(self, network: nn.Module, folder: Path, *, model: DiffusionModel, trained_on: str) -> None:
        """Read a LoRA file."""
        model.load_lora(network, folder)

    def reads(self, saved: Adaptation) -> bool:
        """Whether it is the same: rank, alpha and targets."""
        return saved == self


def _sharing(network: nn.Module) -> nn.Module:
    """A copy of a network's structure that has the very same parameters."""
    return copy.deepcopy(network, memo={id(tensor): tensor for tensor in network.parameters()})


@torch.no_grad()
def _start(network: nn.Module, generator: torch.Generator) -> None:
    """Draw LoRA's first weights as peft does, but from an own generator."""
    for name, parameter in network.named_parameters():
        if "lora_A" in name:
            drawn = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
