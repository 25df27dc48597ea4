"""A KL divergence that keeps a policy near a frozen one: where it enters the gradient, and how hard it pulls.

Source: Tang & Munos, 2025, "On a few pitfalls in KL divergence gradient estimation for RL",
https://arxiv.org/abs/2506.09477; Ziegler et al., 2019, "Fine-Tuning Language Models from Human Preferences",
https://arxiv.org/abs/1909.08593.
"""

import dataclasses
import math
import weakref
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from torch import Tensor

from .experience.rollouts import Rollout
from .policies import DenoisingPolicy, Policy
from .policies.base import Observation
from .training.options import require_number, require_used

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
        for k, b in rollout.micro_batches(steps, lanes, micro_batch_size):
            distribution = reference.distribution(rollout.observation(k, b))
            if not dataclasses.is_dataclass(distribution):
                return
            self._template = distribution
            for name, value in vars(distribution).items():
                if isinstance(value, Tensor):
                    shape = (rollout.num_steps, rollout.actions.shape[1], *value.shape[1:])
                    table = self._tables.setdefault(name, torch.zeros(shape, dtype=value.dtype, device=self._device))
                    table[self._here(k, b)] = value.to(self._device)

    def _here(self, k: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return k.to(self._device), (b - self._first).to(self._device)

    def at(self, k: Tensor, b: Tensor) -> Any:
        """Return the distributions of M transitions, given their indices (steps, lanes); None if there are none."""
        if self._template is None:
            return None
        index = self._here(k, b)
        rows = {name: table[index].to(self._back_on) for name, table in self._tables.items()}
        return dataclasses.replace(self._template, **rows)


@final
class KLPenalty:
    """β·Σ_t KL_t, KL_t = KL(π(·|s_t) ‖ π_ref(·|s_t)) in closed form and in nats, summed over an action's dimensions.

    The objective E[R] − β·E[Σ_t KL_t] has the gradient

        E[ Σ_t ∇log π(a_t|s_t)·(R − β·Σ_{t'>t} KL_{t'}) ] − β·E[ Σ_t ∇KL_t ]

    since an action decides in which states the later divergences are taken. "exact" is all of it. "loss" leaves out the
    later divergences, as Flow-GRPO and DPOK do. "reward" takes Σ_t KL_t from the return and leaves out the last term,
    as TPDM does: it misses the pull on the very step that pays.

    Args:
        policy: What is trained.
        kl_coefficient: β; 0: no penalty.
        kl_place: "exact", "loss" or "reward".
        reference: π_ref; None: `policy.reference()`.
        target_kl: Adapt β until Σ_t KL_t is this; None: β stays.
        kl_horizon: See `adapted_coefficient`.

    Attributes:
        coefficient: β as it is now.
        reference: π_ref, frozen; None where there is no penalty.
        saved_reference: The same, where it is a copy that has to be part of a checkpoint.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its range, or the reference would be trained.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        kl_coefficient: float,
        kl_place: KLPlace,
        reference: Policy | None,
        target_kl: float | None,
        kl_horizon: float,
    ) -> None:
        if kl_place not in get_args(KLPlace):
            raise ValueError(f"kl_place must be one of {get_args(KLPlace)}, got {kl_place!r}")
        require_number("[0, inf)", kl_coefficient=kl_coefficient)
        require_number("[1, inf)", kl_horizon=kl_horizon)
        require_number("(0, inf)", none=True, target_kl=target_kl)
        if target_kl is not None and kl_coefficient == 0:
            raise ValueError(
                f"target_kl scales kl_coefficient, which has to start above 0; got {target_kl} and {kl_coefficient}"
            )
        require_used("a kl_coefficient above 0", kl_coefficient > 0, kl_place=(kl_place, "loss"))
        require_used("target_kl", target_kl is not None, kl_horizon=(kl_horizon, 10.0))
        if reference is not None and not kl_coefficient:
            raise ValueError(
                f"reference needs a kl_coefficient above 0, got {kl_coefficient}: without it there is no KL"
            )
        self.coefficient = kl_coefficient
        self.place: KLPlace = kl_place
        self.target_kl = target_kl
        self.horizon = kl_horizon
        self._given = reference is not None
        self.reference = self._frozen(policy, reference) if kl_coefficient else None
        remade = self._given or isinstance(policy, DenoisingPolicy)
        self.saved_reference = None if remade else self.reference

    @staticmethod
    def _frozen(policy: Policy, reference: Policy | None) -> Policy:
        if reference is None:
            return policy.reference()
        if not isinstance(reference, Policy):
            raise TypeError(f"reference must be a Policy, such as policy.reference(); got {reference!r}")
        trained = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
        if any(id(parameter) in trained for parameter in reference.parameters()):
            raise ValueError("reference must not share what is trained: give policy.reference(), or None for the same")
        return reference.requires_grad_(False)

    @property
    def is_measured_first(self) -> bool:
        """Whether every KL_t of a rollout is needed before the first update."""
        return self.reference is not None and self.place != "loss"

    @property
    def is_in_the_loss(self) -> bool:
        """Whether ∇KL_t is part of the gradient."""
        return self.reference is not None and self.place != "reward"

    def remembered(
        self, policy: Policy, rollout: Rollout, *, passes: float, micro_batch_size: int
    ) -> RememberedReference | None:
        """Return the `RememberedReference` of a rollout; None where it is not worth it, or not one thing.

        Args:
            policy: What is trained.
            rollout: The rollout.
            passes: How often each of its transitions is looked up.
            micro_batch_size: Transitions that are asked for at once.
        """
        # With train_cfg=False a DenoisingPolicy, and so its reference, scores otherwise where gradients are on.
        is_one_thing = not isinstance(policy, DenoisingPolicy) or policy.train_cfg
        if self.reference is None or passes <= 1 or not is_one_thing:
            return None
        return RememberedReference(self.reference, rollout, micro_batch_size)

    def divergence(self, distribution: Any, observation: Observation, remembered: Any = None) -> Tensor:
        """Return KL_t of the policy's distributions for these observations, [M], with gradients where they are on.

        Args:
            distribution: The policy's.
            observation: What they are of.
            remembered: The reference's for them, where they are known; None: ask it.
        """
        assert self.reference is not None
        return distribution.kl(self.reference.distribution(observation) if remembered is None else remembered, "sum")

    def adapt(self, kl: float) -> None:
        """Move β toward `target_kl`, given the last rollout's mean Σ_t KL_t; one that is NaN leaves β as it is."""
        if self.target_kl is not None and not math.isnan(kl):
            self.coefficient = adapted_coefficient(self.coefficient, kl, target_kl=self.target_kl, horizon=self.horizon)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON can hold it."""
        return {"coefficient": self.coefficient, "reference_given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            ValueError: the run had a reference of the user's, and now has none.
        """
        if state["reference_given"] and not self._given:
            raise ValueError("the run's KL divergence is to a policy that was given to it: give it again, reference=…")
        self.coefficient = state["coefficient"]
