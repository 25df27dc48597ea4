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

        Args:
            generators: One for the batch, or one per sample: then a sample's draw does not depend on the rest of the
                batch. None: torch's global generator.

        Raises:
            ValueError: there are several generators, but not one per sample.
        """
        if generators is None or isinstance(generators, torch.Generator):
            ratios = _draw(self.alpha, self.beta, generators)
        elif len(generators) != len(self.alpha):
            raise ValueError(f"generators must be one per sample: got {len(generators)} for {len(self.alpha)}")
        else:
            rows = zip(self.alpha, self.beta, generators, strict=True)
            ratios = torch.stack([_draw(alpha, beta, generator) for alpha, beta, generator in rows])
        return ratios.clamp(MIN_RATIO, MAX_RATIO)[:, None]

    def log_prob(self, value: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Return the log-density of ratios [B, 1], [B]; in one dimension, sum and mean are the same."""
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


def _draw(alpha: Tensor, beta: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return a draw of Beta(α, β): X/(X + Y) with X ~ Gamma(α) and Y ~ Gamma(β)."""
    if generator is not None and generator.device != alpha.device:
        # A generator of the device, seeded by that of the host: drawing on the host would wait for α and β.
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        generator = torch.Generator(alpha.device).manual_seed(seed)
    x, y = (torch._standard_gamma(concentration, generator=generator) for concentration in (alpha, beta))
    return x / (x + y)
