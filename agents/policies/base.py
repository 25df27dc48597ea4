"""The policy's contract: one distribution that sampling and scoring both go through."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, final

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_gym.transitions import Reduction

Observation = Mapping[str, Tensor]
Generators = torch.Generator | Sequence[torch.Generator]


class Distribution(Protocol):
    """A batch of action distributions."""

    @property
    def mode(self) -> Tensor:
        """The most probable actions, [B, ...]."""

    def sample(self, generators: Generators | None = None) -> Tensor:
        """Return a draw of the actions, [B, ...]."""

    def log_prob(self, value: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Return the log-density of actions, [B]: summed or averaged over an action's dimensions."""


class Policy(nn.Module, ABC):
    """A distribution over actions given an observation, with trainable parameters.

    A subclass gives `distribution`; drawing and scoring go through it and nothing else. Dropout is off at all times:
    a policy that scores with another network than it samples with has no meaningful ratio.

    Args:
        seed: Seeds the generator that actions are drawn from when a call brings none.

    Attributes:
        device: Where observations and actions are.
        generator: The policy's own generator, on the CPU, so that the draws do not depend on the device.
    """

    device: torch.device

    def __init__(self, *, seed: int | None = None) -> None:
        super().__init__()
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    @abstractmethod
    def distribution(self, observation: Observation) -> Distribution:
        """Return the distribution of the actions, in float32, for observations [B, ...] each."""

    @abstractmethod
    def action_dtype(self, observation: Observation) -> torch.dtype:
        """Return the precision in which the environment stores the action."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the trained weights as diffusers loads them, and what else `load` needs."""

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Read what `save` wrote into this policy."""

    def scored(self, info: Mapping[str, object]) -> np.ndarray | None:
        """Return which lanes' next actions have a density, [B] bool on the host; None: all.

        Args:
            info: The environment's info about the observation that the actions answer.
        """
        return None

    def train(self, mode: bool = True) -> "Policy":
        """Do nothing but stay in evaluation mode: dropout is never on."""
        return super().train(False)

    @final
    def sample(
        self,
        observation: Observation,
        *,
        generators: Generators | None = None,
        deterministic: bool = False,
        reduction: Reduction = "sum",
    ) -> tuple[Tensor, Tensor]:
        """Return actions [B, ...] and their log-probs [B], at the price of one.

        The actions are rounded to the precision that they are stored in *before* they are scored, so that scoring
        them again later gives the same number.

        Args:
            observation: [B, ...] each.
            generators: Where the draws come from, one or one per lane; None: the policy's own.
            deterministic: Take the mode instead of a draw.
            reduction: "sum": the log-density; "mean": divided by the number of dimensions.
        """
        distribution = self.distribution(observation)
        action = self._draw(distribution, observation, generators, deterministic)
        return action, distribution.log_prob(action, reduction)

    @final
    @torch.no_grad()
    def act(
        self, observation: Observation, *, generators: Generators | None = None, deterministic: bool = False
    ) -> Tensor:
        """Return actions [B, ...]; the arguments are those of `sample`."""
        return self._draw(self.distribution(observation), observation, generators, deterministic)

    @final
    def log_prob(self, observation: Observation, action: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Return log π(action | observation), [B], with gradients; the arguments are those of `sample`."""
        return self.distribution(observation).log_prob(action, reduction)

    def _draw(
        self, distribution: Distribution, observation: Observation, generators: Generators | None, deterministic: bool
    ) -> Tensor:
        drawn = distribution.mode if deterministic else distribution.sample(generators or self.generator)
        return drawn.detach().to(self.action_dtype(observation))
