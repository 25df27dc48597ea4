"""A KL divergence that keeps a policy near a frozen one: where it enters the gradient, and how hard it pulls.

Source: Tang & Munos, 2025, "On a few pitfalls in KL divergence gradient estimation for RL",
https://arxiv.org/abs/2506.09477; Ziegler et al., 2019, "Fine-Tuning Language Models from Human Preferences",
https://arxiv.org/abs/1909.08593.
"""

import dataclasses
import math
import weakref
from dataclasses import dataclass, field
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from torch import Tensor

from diffusion_gym.checks import checked_number
from diffusion_gym.parts import GIVEN_AGAIN, Part

from .experience.rollouts import Rollout
from .policies import Distribution, Policy
from .policies.base import Observation

KLPlace = Literal["exact", "loss", "reward"]

_MAX_ERROR = 0.2


def later_kl(kl: Tensor) -> Tensor:
    """Return what comes after each step, [T, B]: G_t = Σ_{t'>t} KL_{t'}.

    Args:
        kl: [T, B] KL_t of each step of each episode; 0 beyond its end.
    """
    from_here_on = kl.flip(0).cumsum(0).flip(0)
    return torch.cat([from_here_on[1:], torch.zeros_like(kl[:1])])


def later_kl_advantages(kl: Tensor) -> Tensor:
    """Return how much less KL follows an action than follows the other episodes' at that step, [T, B]: −(G_t − Ḡ_t).

    Ḡ_t is the mean of `later_kl` over the other episodes, which know nothing of the action: it changes no expectation.
    """
    later = later_kl(kl)
    others = later.shape[1] - 1
    return -later if others == 0 else -(later - later.mean(1, keepdim=True)) * ((others + 1) / others)


def adapted_coefficient(coefficient: float, kl: float, *, target_kl: float, horizon: float) -> float:
    """Return the next coefficient: β·(1 + e/horizon), e = clip(KL/target − 1, −0.2, 0.2).

    Source: Ziegler et al., 2019, section 2.2, https://arxiv.org/abs/1909.08593 (1/horizon = K_β = 0.1 per rollout).

    Args:
        coefficient: β of the rollout.
        kl: Its mean KL of an episode.
        target_kl: What that is to be.
        horizon: Rollouts in which a steady error of e changes β by about the factor 1 + e.
    """
    error = min(max(kl / target_kl - 1, -_MAX_ERROR), _MAX_ERROR)
    return coefficient * (1 + error / horizon)


@final
class RememberedReference:
    """A frozen policy's distributions of a rollout's scored transitions: asked once, however often they are looked up.

    What they are made of (a Gaussian's means, of the latents' size) is kept where the rollout is.

    Args:
        reference: The policy. If its distributions are no dataclasses, nothing is remembered.
        rollout: The rollout.
        micro_batch_size: Transitions that are asked for at once.
    """

    @torch.no_grad()
    def __init__(self, reference: Policy, rollout: Rollout, micro_batch_size: int) -> None:
        self.rollout = weakref.ref(rollout)
        self._device, self._first = rollout.actions.device, rollout.first_episode
        self._back_on = rollout.returns.device
        self._template: Any = None
        self._tables: dict[str, Tensor] = {}
        steps, lanes = np.nonzero(rollout.scored)
        for step, lane in rollout.micro_batches(steps, lanes, micro_batch_size):
            distribution = reference.distribution(rollout.observation(step, lane))
            if not dataclasses.is_dataclass(distribution):
                return
            self._template = distribution
            for name, value in vars(distribution).items():
                if isinstance(value, Tensor):
                    shape = (rollout.num_steps, rollout.actions.shape[1], *value.shape[1:])
                    table = self._tables.setdefault(name, torch.zeros(shape, dtype=value.dtype, device=self._device))
                    table[self._here(step, lane)] = value.to(self._device)

    def _here(self, steps: Tensor, lanes: Tensor) -> tuple[Tensor, Tensor]:
        return steps.to(self._device), (lanes - self._first).to(self._device)

    def at(self, steps: Tensor, lanes: Tensor) -> Distribution | None:
        """Return the distributions of M transitions, given their indices; None if they could not be remembered."""
        if self._template is None:
            return None
        index = self._here(steps, lanes)
        rows = {name: table[index].to(self._back_on) for name, table in self._tables.items()}
        return dataclasses.replace(self._template, **rows)


@final
@dataclass(frozen=True)
class KL(Part):
    """A pull to a frozen policy: β·Σ_t KL_t, KL_t = KL(π(·|s_t) ‖ π_ref(·|s_t)), in nats, summed over dimensions.

    The objective E[R] − β·E[Σ_t KL_t] has the gradient

        E[ Σ_t ∇log π(a_t|s_t)·(R − β·Σ_{t'>t} KL_{t'}) ] − β·E[ Σ_t ∇KL_t ]

    since an action decides in which states the later divergences are taken. Here R stands for the advantage; only with
    "reward" it is the reward itself. The reduction of the log-probs changes nothing of it. Steps without a density have
    no KL.

    Args:
        coefficient: β > 0, in units of the advantage (with "reward", of the reward).
        place: "exact": all of the gradient, at the price of one more pass of both policies over the rollout. "loss", as
            Flow-GRPO and DPOK do: without the later divergences. "reward", as TPDM does: Σ_t KL_t is taken from the
            return, once, at sampling, and the last term is left out: it misses the pull on the very step that pays.
        reference: π_ref, a policy of the same environment; it is frozen, not saved, and to be given to `load` again.
            None: the untrained policy, `policy.reference()`: of a `DenoisingPolicy` the model that it was made from,
            without a copy; of others a copy made now, part of a checkpoint. Where it is needed more than once ("exact",
            n_epochs above 1) what it says of a rollout is kept beside it: as much memory as its actions take.
        target: Adapt β after each rollout, so that Σ_t KL_t (the log's `train/kl`) becomes this, in nats; None: keep β.
        horizon: β ← β·(1 + e/horizon), e = clip(KL/target − 1, ±0.2): 10, as published, is 2 % a rollout at the most.

    Note:
        In bfloat16 two networks that are all but the same differ by rounding, most at the cleanest steps, whose std is
        small. On the emoji model (10 steps) Σ_t KL_t has so a floor of 27 nats an image, where float32 says 3e-6: no
        smaller `target` can be held there, and `precision=None` tells what the KL is.

    Raises:
        TypeError, ValueError: a value is of the wrong kind or out of its range.
    """

    coefficient: float
    place: KLPlace = "loss"
    reference: Policy | None = field(default=None, metadata=GIVEN_AGAIN)
    target: float | None = None
    horizon: float = 10.0

    def __post_init__(self) -> None:
        if self.place not in get_args(KLPlace):
            raise ValueError(f"place must be one of {get_args(KLPlace)}, got {self.place!r}")
        checked_number("coefficient", self.coefficient, "(0, inf)")
        checked_number("horizon", self.horizon, "[1, inf)")
        if self.target is not None:
            checked_number("target", self.target, "(0, inf)")
        elif self.horizon != 10.0:
            raise ValueError(f"horizon={self.horizon!r} has no effect: it needs target")
        if not isinstance(self.reference, Policy | None):
            raise TypeError(f"reference must be a Policy, such as policy.reference(); got {self.reference!r}")


@final
class KLPenalty:
    """The `KL` of a run: its reference, and β as it is now.

    Args:
        policy: What is trained.
        part: What the algorithm was given.

    Attributes:
        coefficient: β.
        reference: π_ref, frozen.
        saved_reference: The same, where it is a copy that has to be part of a checkpoint; else None.

    Raises:
        ValueError: the reference would be trained.
    """

    def __init__(self, policy: Policy, part: KL) -> None:
        self.part = part
        self.coefficient = part.coefficient
        self.reference = self._frozen(policy, part.reference)
        is_remade = part.reference is not None or policy.reference_is_free
        self.saved_reference = None if is_remade else self.reference

    @staticmethod
    def _frozen(policy: Policy, reference: Policy | None) -> Policy:
        if reference is None:
            return policy.reference()
        trained = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
        if any(id(parameter) in trained for parameter in reference.parameters()):
            raise ValueError("reference must not share what is trained: give policy.reference(), or None for the same")
        return reference.requires_grad_(False)

    @property
    def is_measured_first(self) -> bool:
        """Whether every KL_t of a rollout is needed before the first update."""
        return self.part.place != "loss"

    @property
    def is_in_the_loss(self) -> bool:
        """Whether ∇KL_t is part of the gradient."""
        return self.part.place != "reward"

    def divergence(
        self, distribution: Distribution, observation: Observation, remembered: Distribution | None = None
    ) -> Tensor:
        """Return KL_t of the policy's distributions for these observations, [M], with gradients where they are on.

        Args:
            distribution: The policy's.
            observation: What they are of.
            remembered: The reference's for them, where they are known; None: ask it.
        """
        return distribution.kl(self.reference.distribution(observation) if remembered is None else remembered, "sum")

    def adapt(self, kl: float) -> None:
        """Move β toward the target, given the last rollout's mean Σ_t KL_t; one that is NaN leaves β as it is."""
        target = self.part.target
        if target is not None and not math.isnan(kl):
            self.coefficient = adapted_coefficient(self.coefficient, kl, target_kl=target, horizon=self.part.horizon)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON can hold it."""
        return {"coefficient": self.coefficient, "reference_given": self.part.reference is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            ValueError: the run had a reference of the user's, and now has none.
        """
        if state["reference_given"] and self.part.reference is None:
            raise ValueError("the run's KL divergence is to a policy that was given to it: give it again, reference=…")
        self.coefficient = state["coefficient"]
