"""The Beta distribution of a ratio in (0, 1), drawn from explicit generators."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Beta, kl_divergence

from diffusion_gym.grids import MAX_RATIO, MIN_RATIO
from diffusion_gym.transitions import Reduction

from .base import Generators


@dataclass(frozen=True, eq=False)
class BetaDistribution:
    """A batch of Beta(α, β) with α, β > 1, so each has one mode; actions are [B, 1].

    Draws are clipped to [0.001, 0.999], as the environment does, and scored as they were clipped.

    Args:
        alpha: [B] float32.
        beta: [B] float32.
    """

    alpha: Tensor
    beta: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor) -> "BetaDistribution":
        """Return Beta(1 + e^a, 1 + e^b) of logits [B, 2] = (a, b).

        Source: Ye et al., 2024, eq. 6, https://arxiv.org/abs/2412.01243.

        Note:
            a and b are kept below 8: beyond, the density is a spike that float32 cannot tell from a point.
        """
        parameters = 1 + logits.float().clamp(max=8.0).exp()
        return cls(parameters[:, 0], parameters[:, 1])

    @staticmethod
    def logits_of(mode: Tensor, concentration: float) -> Tensor:
        """Return the logits [B, 2] of the Betas with these modes [B] in (0, 1) and α + β = concentration > 2."""
        weight = concentration - 2
        return torch.stack([weight * mode, weight * (1 - mode)], dim=-1).log()

    @property
    def mode(self) -> Tensor:
        """The most probable ratios, [B, 1]: (α − 1) / (α + β − 2)."""
        return ((self.alpha - 1) / (self.alpha + self.beta - 2)).clamp(MIN_RATIO, MAX_RATIO)[:, None]

    def sample(self, generators: Generators | None = None) -> Tensor:
        """Return a draw of the ratios, [B, 1].

        torch's Beta takes no generator, so each one given seeds torch's own for the length of the draw.
        """
        if generators is None:
            drawn = self._torch.sample()
        elif isinstance(generators, torch.Generator):
            drawn = _draw(self._torch, generators)
        else:
            if len(generators) != len(self.alpha):
                raise ValueError(f"generators must be one per sample: got {len(generators)} for {len(self.alpha)}")
            drawn = torch.stack(
                [_draw(Beta(*row), g) for *row, g in zip(self.alpha, self.beta, generators, strict=True)]
            )
        return drawn.clamp(MIN_RATIO, MAX_RATIO)[:, None]

    def log_prob(self, value: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Return the log-density of ratios [B, 1], [B]; of one dimension, sum and mean are the same."""
        return self._torch.log_prob(value[:, 0].float())

    def entropy(self) -> Tensor:
        """Return the differential entropy, [B]."""
        return self._torch.entropy()

    def kl(self, other: "BetaDistribution", reduction: Reduction = "sum") -> Tensor:
        """Return KL(self ‖ other), [B]."""
        return kl_divergence(self._torch, other._torch)

    @property
    def _torch(self) -> Beta:
        return Beta(self.alpha, self.beta, validate_args=False)


def _draw(distribution: Beta, generator: torch.Generator) -> Tensor:
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    device = distribution.concentration1.device
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        return distribution.sample()
