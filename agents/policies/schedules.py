"""Schedules of times that do not look at the image: the baselines of a time predictor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_gym.grids import MAX_RATIO, MIN_RATIO
from diffusion_gym.models.base import DiffusionModel
from diffusion_gym.models.weights import read_weights, require_weights
from diffusion_gym.transitions import Reduction

from .base import Generators, Observation, Policy, Shape, read_config, write_config
from .beta import BetaDistribution

_WEIGHTS_FILE = "schedule.safetensors"
_NEEDED: Mapping[str, Shape] = {"step": (1,), "action": (1,)}


def _step_index(observation: Observation, max_steps: int) -> Tensor:
    """Return the number of steps that each lane has taken, [B] int64."""
    return (observation["step"][:, 0] * max_steps).round().long().clamp(max=max_steps - 1)


class ContextFreeSchedule(Policy):
    """One Beta of the ratio r per step, the same for every image and prompt.

    Trained in the same way, it is the fair baseline of a `TimePredictor`, whose view of the image it lacks. Untrained
    and built from a grid's ratios, it is TPDM's reference distribution (Betas of concentration 20 whose modes follow
    the grid).

    Source: Ye et al., 2024, https://arxiv.org/abs/2412.01243 (reference distributions).

    Args:
        initial_ratios: [max_steps] the modes before training, in (0, 1); `max_steps` is the environment's.
        initial_concentration: α + β before training; above 2.
        device: The device of its weights.
        seed: The seed of its draws.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        initial_ratios: Sequence[float],
        *,
        initial_concentration: float = 16.0,
        device: str | torch.device = "cpu",
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        ratios = torch.as_tensor(initial_ratios, dtype=torch.float32)
        if ratios.ndim != 1 or not len(ratios) or not bool(((ratios > 0) & (ratios < 1)).all()):
            raise ValueError(f"initial_ratios must be a vector of numbers in (0, 1), got {initial_ratios}")
        if not 2 < initial_concentration < math.inf:
            raise ValueError(f"initial_concentration must be above 2 and finite, got {initial_concentration}")
        self.device = torch.device(device)
        self.max_steps: int = len(ratios)
        self.logits = nn.Parameter(BetaDistribution.logits_of(ratios, initial_concentration).to(self.device))

    @property
    def needed_shapes(self) -> Mapping[str, Shape]:
        """The shapes of the number of steps taken and of the ratio."""
        return _NEEDED

    def distribution(self, observation: Observation) -> BetaDistribution:
        """Return the Betas of the lanes' next ratios."""
        return BetaDistribution.from_logits(self.logits[_step_index(observation, self.max_steps)])

    def save(self, folder: Path) -> None:
        """Write the weights, in safetensors."""
        write_config(folder, self, max_steps=self.max_steps)
        save_file(self.state_dict(), Path(folder) / _WEIGHTS_FILE)

    def load_weights(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the folder is not a saved policy.
            ValueError: it has another number of steps, its weights are not finite, or a file is damaged.
        """
        read_config(Path(folder), type(self))
        file = Path(folder) / _WEIGHTS_FILE
        weights = read_weights(file)
        require_weights(weights, self.state_dict(), file=file, owner=f"this {type(self).__name__}")
        self.load_state_dict(weights)

    @classmethod
    def load(
        cls, folder: Path | str, model: DiffusionModel | None = None, device: str | torch.device = "cpu"
    ) -> "ContextFreeSchedule":
        """Return the schedule that `save` wrote."""
        config = read_config(Path(folder), cls)
        policy = cls([0.5] * config.pop("max_steps"), device=device, **config)
        policy.load_weights(Path(folder))
        return policy


@dataclass(frozen=True, eq=False)
class _Point:
    """All mass on one value, [B, 1]."""

    mode: Tensor

    def sample(self, generators: Generators | None = None) -> Tensor:
        return self.mode

    def log_prob(self, value: Tensor, reduction: Reduction = "sum") -> Tensor:
        raise ValueError("a fixed schedule has no density: there is nothing in it to train")

    def kl(self, other: "_Point", reduction: Reduction = "sum") -> Tensor:
        raise ValueError("a fixed schedule has no density, and so no KL divergence: there is nothing in it to train")

    def entropy(self) -> Tensor:
        return torch.zeros_like(self.mode[:, 0])


class FixedSchedule(Policy):
    """A fixed grid of times, walked through the environment like any other policy; there is nothing to train.

    Args:
        ratios: [num_steps] r of each step, such as `diffusion_gym.grids.step_ratios` of a grid; the last one is
            repeated should an episode go on.
        max_steps: The environment's `max_steps`; None: the number of ratios.
        device: The device of the ratios.

    Raises:
        ValueError: there are no ratios, or more than `max_steps`.
    """

    ratios: Tensor

    def __init__(
        self, ratios: Sequence[float] | Tensor, *, max_steps: int | None = None, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(seed=0)
        values = torch.as_tensor(ratios, dtype=torch.float32).clamp(MIN_RATIO, MAX_RATIO)
        self.max_steps: int = len(values) if max_steps is None else max_steps
        if values.ndim != 1 or not 0 < len(values) <= self.max_steps:
            raise ValueError(f"ratios must be a vector of 1 to {self.max_steps} numbers, got {ratios}")
        self.device = torch.device(device)
        self.register_buffer("ratios", values.to(self.device))

    @property
    def needed_shapes(self) -> Mapping[str, Shape]:
        """The shapes of the number of steps taken and of the ratio."""
        return _NEEDED

    def distribution(self, observation: Observation) -> _Point:
        """Return the lanes' next ratios."""
        index = _step_index(observation, self.max_steps).clamp(max=len(self.ratios) - 1)
        return _Point(self.ratios[index][:, None])

    def scored(self, info: Mapping[str, object]) -> np.ndarray:
        """Return the mask of actions with a density, [B] bool: there are none."""
        return np.zeros(len(np.asarray(info["nfe"])), dtype=bool)

    def save(self, folder: Path) -> None:
        """Write the ratios."""
        write_config(folder, self, ratios=self.ratios.tolist(), max_steps=self.max_steps)
        self._save_further(folder, "ratios")

    def load_weights(self, folder: Path) -> None:
        """Read what `save` wrote; ValueError: it has another number of ratios."""
        ratios = torch.tensor(read_config(Path(folder), type(self))["ratios"])
        if ratios.shape != self.ratios.shape:
            raise ValueError(f"{folder} has {len(ratios)} ratios, this schedule {len(self.ratios)}")
        self.ratios.copy_(ratios)
        self._load_further(folder, "ratios")

    @classmethod
    def load(
        cls, folder: Path | str, model: DiffusionModel | None = None, device: str | torch.device = "cpu"
    ) -> "FixedSchedule":
        """Return the schedule that `save` wrote."""
        policy = cls(device=device, **read_config(Path(folder), cls))
        policy.load_weights(Path(folder))
        return policy
