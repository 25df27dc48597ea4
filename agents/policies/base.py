"""The policy's contract: one distribution that sampling and scoring both go through."""

import copy
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, final

import numpy as np
import torch
from gymnasium.spaces import Dict, Space
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_gym.checks import checked_integer
from diffusion_gym.models.base import DiffusionModel
from diffusion_gym.models.weights import read_weights, require_weights
from diffusion_gym.transitions import Reduction

Observation = Mapping[str, Tensor]
Generators = torch.Generator | Sequence[torch.Generator]
Shape = tuple[int | None, ...]

CONFIG_FILE = "policy.json"
_FURTHER_FILE = "further_weights.safetensors"


_Same = TypeVar("_Same", bound="Distribution")


class Distribution(Protocol):
    """A batch of action distributions, all of one family."""

    @property
    def mode(self) -> Tensor:
        """The most probable actions, [B, ...]."""

    def sample(self, generators: Generators | None = None) -> Tensor:
        """A draw of the actions, [B, ...]."""

    def log_prob(self, value: Tensor, reduction: Reduction = "sum") -> Tensor:
        """The log-density of actions, [B]: summed or averaged over an action's dimensions."""

    def kl(self: _Same, other: _Same, reduction: Reduction = "sum") -> Tensor:
        """KL(self ‖ other), [B], to another distribution of the family: summed or averaged likewise."""

    def entropy(self) -> Tensor:
        """The differential entropy, [B], summed over an action's dimensions."""


def write_config(folder: Path | str, policy: "Policy", **config: object) -> None:
    """Write the class of the policy that a folder holds, and the arguments that make it anew.

    Raises:
        TypeError: the policy's constructor has arguments of its own that would be lost.
    """
    config |= policy.saved_arguments()
    if type(policy).load.__func__.__module__.startswith(__package__):  # type: ignore[attr-defined]
        package_classes = [kind for kind in type(policy).__mro__ if kind.__module__.startswith(__package__)]
        lost = (
            _arguments(type(policy)) - config.keys() - {name for kind in package_classes for name in _arguments(kind)}
        )
        if lost:
            raise TypeError(
                f"{type(policy).__name__} would be loaded without its own arguments {sorted(lost)}: return them from "
                "saved_arguments(), as JSON can hold them, or override load"
            )
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"policy": type(policy).__name__, **config}, indent=2)
    (Path(folder) / CONFIG_FILE).write_text(text)


def _arguments(kind: type) -> set[str]:
    parameters = inspect.signature(kind).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}


def read_config(folder: Path, kind: "type[Policy]") -> dict[str, Any]:
    """Return the arguments that `write_config` wrote for a policy of a class, or of one that it extends.

    Raises:
        FileNotFoundError: the folder is not a saved policy.
        ValueError: it holds a policy of another class.
    """
    config = _read(folder)
    name = config.pop("policy")
    if name not in {base.__name__ for base in kind.__mro__}:
        raise ValueError(f"{folder} holds a {name}, not a {kind.__name__}: load it with {name}.load")
    return config


def saved_class(folder: Path) -> str:
    """Return the name of the class of the policy in a folder; FileNotFoundError: there is none."""
    return str(_read(folder)["policy"])


def _read(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not a saved policy: it has no {CONFIG_FILE}")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): take another copy of it") from error
    if not isinstance(config, dict) or "policy" not in config:
        raise ValueError(f"{file} does not say which policy the folder holds")
    return config


class Policy(nn.Module, ABC):
    """A distribution over actions given an observation, with trainable parameters.

    A subclass gives `distribution`; drawing and scoring go through it and nothing else. Dropout is off at all times:
    a policy that scores with another network than it samples with has no meaningful ratio.

    Args:
        seed: Seeds the generator that actions are drawn from when a call brings none.

    Attributes:
        device: The device of observations and actions.
        generator: The policy's own generator, on the CPU, so that the draws do not depend on the device.
        moves_latents: Whether an action is the next latents, and `predict_noised` and `sensitivity` mean something.
        model: The diffusion model that the policy trains a part of; None: there is none.
        max_steps: The length of the longest episodes that it can act in; None: any.
        reference_is_free: Whether `reference` is at any time the policy before the training, without a copy that a
            checkpoint would have to hold.
    """

    device: torch.device
    moves_latents: bool = False
    model: DiffusionModel | None = None
    max_steps: int | None = None
    reference_is_free: bool = False

    def __init__(self, *, seed: int | None = None) -> None:
        super().__init__()
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(checked_integer("seed", seed, at_least=0))

    @abstractmethod
    def distribution(self, observation: Observation) -> Distribution:
        """Return the distribution of the actions, in float32, for observations [B, ...] each."""

    @property
    def needed_shapes(self) -> Mapping[str, Shape]:
        """The shapes that the policy needs, by key of one lane's observation and "action"; other keys are free."""
        return {}

    @final
    def check_fit(self, observation_space: Space, action_space: Space) -> None:
        """Raise ValueError if the policy cannot act where one lane has these spaces."""
        spaces = {**(observation_space if isinstance(observation_space, Dict) else {}), "action": action_space}
        shapes = {key: space.shape or () for key, space in spaces.items()}
        for key, needed in self.needed_shapes.items():
            shape = shapes.get(key, ())
            pairs = zip(needed, shape, strict=False)
            if len(shape) != len(needed) or any(need not in (None, size) for need, size in pairs):
                raise ValueError(
                    f"{type(self).__name__} does not fit the environment: it needs {key} of shape {needed}, and there "
                    f"is {shape if key in shapes else 'none'}; make it from this environment's model or space"
                )

    def check_prompts(self, observation_space: Space, prompts: Sequence[str], negative_prompt: str) -> None:
        """Raise ValueError if the policy would take an environment's prompts for others."""

    @property
    def needs_loss_scaling(self) -> bool:
        """Whether small gradients would vanish unless the loss is scaled up: with arithmetic in fp16."""
        return False

    def action_dtype(self, observation: Observation) -> torch.dtype:
        """Return the precision in which the environment stores the action."""
        return torch.float32

    def saved_arguments(self) -> Mapping[str, Any]:
        """Return the arguments of a subclass's constructor beside the inherited ones, as JSON can hold them.

        `save` writes them, and an inherited `load` gives them to the constructor again.
        """
        return {}

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the trained weights as diffusers loads them, and whatever else `load` needs.

        Every policy here begins with `write_config(folder, self, …)` of `agents.policies.base`, which writes the class
        and the arguments that make it anew; where a user's policy does not, a run's `save` writes the class for it.
        """

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Read what `save` wrote into this policy."""

    @classmethod
    @abstractmethod
    def load(
        cls, folder: Path | str, model: DiffusionModel | None = None, device: str | torch.device = "cpu"
    ) -> "Policy":
        """Return the policy that `save` wrote.

        Args:
            folder: The folder that `save` wrote.
            model: The loaded diffusion model, for policies that are made from one; None: load it.
            device: The device to load it on.

        Raises:
            FileNotFoundError: the folder is not a saved policy.
        """

    def _further_weights(self, saved: str) -> dict[str, Tensor]:
        """Return the weights of a subclass beside the part `saved`, which is written by itself."""
        return {name: value.clone() for name, value in self.state_dict().items() if name.partition(".")[0] != saved}

    def _save_further(self, folder: Path, saved: str) -> None:
        """Write the weights of a subclass beside the part `saved`, if there are any."""
        if weights := self._further_weights(saved):
            save_file(weights, Path(folder) / _FURTHER_FILE)

    def _load_further(self, folder: Path, saved: str) -> None:
        """Read what `_save_further` wrote; ValueError: it is not there, or does not fit."""
        file = Path(folder) / _FURTHER_FILE
        if expected := self._further_weights(saved):
            weights = read_weights(file) if file.is_file() else {}
            require_weights(weights, expected, file=file, owner=type(self).__name__)
            self.load_state_dict(weights, strict=False)

    def scored(self, info: Mapping[str, object]) -> np.ndarray | None:
        """Return the mask of lanes whose next action has a density, [B] bool on the host; None: all.

        Args:
            info: The environment's info about the observation that the actions answer.
        """
        return None

    def sensitivity(self, t: Tensor, s: Tensor) -> Tensor | None:
        """Return the standard deviations that steps from times t to s move when the network's output moves by 1, [...].

        None: the policy does not know.
        """
        return None

    def windowed(self, noisy: float, clean: float) -> "Policy":
        """Return a view of this policy whose steps are deterministic outside a window: times t with clean < t ≤ noisy.

        Raises:
            ValueError: its steps cannot be made deterministic.
        """
        raise ValueError(
            f"the steps of a {type(self).__name__} cannot be made deterministic outside a window: leave the window out"
        )

    def reference(self) -> "Policy":
        """Return the frozen reference of a KL divergence: a copy of this policy as it is now."""
        return copy.deepcopy(self).requires_grad_(False)

    def train(self, mode: bool = True) -> "Policy":
        """Stay in evaluation mode, whatever the mode: dropout is never on."""
        return super().train(False)

    @final
    def sample(
        self,
        observation: Observation,
        *,
        generators: Generators | None = None,
        deterministic: bool = False,
        reduction: Reduction = "sum",
        precision: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return actions [B, ...] and their log-probs [B], at the cost of one distribution.

        The actions are rounded to the precision that they are stored in *before* they are scored, so that scoring
        them again later gives the same number.

        Args:
            observation: [B, ...] each.
            generators: The generators of the draws, one or one per lane; None: the policy's own.
            deterministic: Take the mode instead of a draw.
            reduction: "sum": the log-density; "mean": divided by the number of dimensions.
            precision: The precision that the actions will be stored in, if it is less than the environment's.

        Raises:
            TypeError, ValueError: the observation is not of torch tensors, or not of a batch.
        """
        self._check_batch(observation)
        distribution = self.distribution(observation)
        action = self._draw(distribution, observation, generators, deterministic, precision)
        return action, distribution.log_prob(action, reduction)

    @final
    @torch.no_grad()
    def act(
        self,
        observation: Observation,
        *,
        generators: Generators | None = None,
        deterministic: bool = False,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """Return actions [B, ...]; the arguments are those of `sample`."""
        self._check_batch(observation)
        return self._draw(self.distribution(observation), observation, generators, deterministic, precision)

    @final
    def log_prob(self, observation: Observation, action: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Return log π(action | observation), [B], with gradients; the arguments are those of `sample`."""
        return self.distribution(observation).log_prob(action, reduction)

    def _check_batch(self, observation: Observation) -> None:
        """Raise TypeError or ValueError for the observation of a single environment."""
        cure = (
            "an algorithm's predict takes such ones too; or give "
            "{key: torch.as_tensor(value)[None] for key, value in observation.items()}"
        )
        for key, value in observation.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"observations must be of torch tensors [B, ...], {key} is a {type(value)}: {cure}")
        for key, shape in self.needed_shapes.items():
            if key in observation and observation[key].ndim != len(shape) + 1:
                raise ValueError(
                    f"observations must be of a batch, {key} of {len(shape) + 1} dimensions, [B, ...]; got shape "
                    f"{list(observation[key].shape)}: {cure}"
                )

    def _draw(
        self,
        distribution: Distribution,
        observation: Observation,
        generators: Generators | None,
        deterministic: bool,
        precision: torch.dtype | None,
    ) -> Tensor:
        action = distribution.mode if deterministic else distribution.sample(generators or self.generator)
        return action.detach().to(precision or action.dtype).to(self.action_dtype(observation))
