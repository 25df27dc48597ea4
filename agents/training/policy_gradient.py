"""The update loop of every policy-gradient algorithm: advantages, ratios, a pull to a reference, once for all."""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from diffusion_gym import transfer
from diffusion_gym.checks import checked_number
from diffusion_gym.transitions import Reduction

from ..advantages import Advantages, Batch, Rewards
from ..experience.environment import check_fit
from ..experience.rollouts import Rollout
from ..kl import KL, KLPenalty, RememberedReference, later_kl_advantages
from ..logs.diagnostics import Metrics, mean_of, ratio_metrics
from ..losses import Surrogate, approximate_kl
from ..policies import Distribution, Policy
from ..policies.base import Observation
from ..steps import Steps, inverse_sensitivities
from .algorithm import Algorithm

Ratio = Literal["step", "trajectory"]
MicroBatch = tuple[Tensor, Tensor]
"""Steps and lanes of transitions, [M] each."""

_REFERENCE_FOLDER = "reference"


@dataclass(kw_only=True, eq=False, repr=False)
class PolicyGradient(Algorithm):
    """An algorithm that learns from the actions of whole episodes, near a reference policy if asked.

    A subclass gives `surrogate`, and `advantages` or `advantages_of`; see `examples/my_algorithm.py`. Each rollout is
    learnt from in `n_epochs` passes, with one update per `batch_size` episodes; memory is that of `micro_batch_size`
    transitions, however long an episode is.

    Args:
        advantages: How good each episode is beside others, `PerPrompt(…)`, `Batch(…)`, `Groups(…)`, `PromptMeans(…)`,
            or each action beside what was expected, `Critic(…)`.
        steps: Which steps are stochastic and learnt from, and how much each counts.
        kl: A pull to a reference policy; None: none.
        stop_kl: Before an update whose `train/approx_kl` (k3, of the log-probs as they are reduced) to the policy that
            sampled is above this, drop it and the rest of the rollout's; `train/early_stopped` counts them. (SB3's PPO:
            1.5·`target_kl`.) Waits for the device once an update.
        log_prob_reduction: How log-probs are reduced over an action's dimensions. None: "mean" for single steps of
            latents, as the published codes do ("sum", as the papers write, diverges at once at 16,384 dimensions,
            DDPO's authors report); "sum" for whole trajectories and for times, which are one number.
    """

    advantages: Advantages = Batch()
    steps: Steps = Steps()
    kl: KL | None = None
    stop_kl: float | None = None
    log_prob_reduction: Reduction | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.advantages, Advantages):
            raise TypeError(f"advantages must be a part, such as PerPrompt(16) or Groups(); got {self.advantages!r}")
        if not isinstance(self.steps, Steps):
            raise TypeError(f"steps must be a part, such as Steps(…); got {self.steps!r}")
        if not isinstance(self.kl, KL | None):
            raise TypeError(f"kl must be None or a part, such as KL(0.1); got {self.kl!r}")
        self.advantages.check(self.sizes.group)
        if self.advantages.looks_at_states and self.processes.count > 1:
            raise ValueError(
                f"each of {self.processes.count} processes would fit a critic of its own to its own episodes: train in "
                f"one process, or with advantages that compare rewards alone; got {self.advantages!r}"
            )
        self._memory = self.advantages.memory(self.env.single_observation_space, self.base_env.device)
        self.steps.check(self.policy, self.base_env)
        if self.stop_kl is not None:
            checked_number("stop_kl", self.stop_kl, "(0, inf)")
        if self.kl is not None and self.kl.place == "exact" and self.steps.weights != "equal":
            raise ValueError(
                'KL(place="exact") asks for the gradient of one objective, in which all steps count the same: give '
                f'place="loss" or "reward" with weights={self.steps.weights!r}'
            )
        if self.ratio_of == "trajectory" and not self.steps.are_alike:
            raise ValueError(
                'Steps(fraction=…, weights=…) go with ratio="step": the ratio of a trajectory is that of all its '
                f"steps; got {self.steps.fraction} and {self.steps.weights!r}"
            )
        self.penalty = None if self.kl is None else KLPenalty(self.policy, self.kl)
        if self.penalty is not None:
            check_fit(self.env, self.penalty.reference)
            self.processes.join(list(self.penalty.reference.parameters()))
        self._remembered: RememberedReference | None = None
        self._unlearnt: Rollout | None = None  # a rollout that was drawn with the weights as they are

    @abstractmethod
    def surrogate(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Surrogate:
        """Return the gradient of the loss of M actions, as its coefficient ∂loss/∂log π of each, and the loss to log.

        Only the coefficient trains. The gradient is averaged over an update's actions, or with `ratio_of` "trajectory"
        over its episodes. It has to treat each action for itself: M is that of a micro-batch, and may be 0; the names
        of its metrics are always the same.

        Args:
            log_prob: [M] log π(a|s), without gradients. With `ratio_of` "trajectory" log π − log π_old, summed over the
                action's whole episode: what both have in common is log_prob − old_log_prob.
            old_log_prob: [M] log π_old(a|s) of the policy that sampled; 0 for whole episodes.
            advantages: [M] A, with the weights of steps and the KL divergences to come in it.
        """

    def advantages_of(self, rollout: Rollout) -> Tensor:
        """Return the advantage of each episode, [B], 0 where it has no valid reward; asked once for each rollout.

        Of each action, [T, B], where the part `looks_at_states`. A subclass that overrides it makes no use of the field
        `advantages`.
        """
        rewards = Rewards(
            rollout.returns, rollout.valid, rollout.prompt_id, self.base_env.prompts.texts, self.sizes.group, rollout
        )
        return self.advantages.of(rewards, self._memory)

    @property
    def ratio_of(self) -> Ratio:
        """Whether `surrogate` is told of single steps or of whole trajectories."""
        return "step"

    @property
    @final
    def reduction(self) -> Reduction:
        """How log-probs are reduced over an action's dimensions."""
        if self.log_prob_reduction is not None:
            return self.log_prob_reduction
        return "mean" if self.policy.moves_latents and self.ratio_of == "step" else "sum"

    @property
    def behaviour(self) -> Policy:
        """The policy that is trained; with a window deterministic outside this iteration's."""
        if self.steps.window is None:
            return self.policy
        return self.steps.window.of_iteration(self.policy, self.base_env, seed=self.run_seed, iteration=self.iteration)

    @final
    def train(self, rollout: Rollout) -> Metrics:
        """Update the policy from one rollout; return means over its updates."""
        advantages, kl = self._advantages_of_actions(rollout)
        updates, num_dropped = self._updates(rollout, advantages)
        metrics = {**mean_of(updates)}
        if kl is not None:
            metrics["kl"] = kl
        elif "kl" in metrics:  # a mean over steps, here made a sum over an episode's: the unit of KL(target=…)
            metrics["kl"] = metrics["kl"] * float(rollout.scored.sum() / rollout.valid.sum())
        if self.stop_kl is not None:
            metrics["early_stopped"] = advantages.new_tensor(num_dropped)
        if self.penalty is not None and self.penalty.part.target is not None:
            metrics["kl_coefficient"] = advantages.new_tensor(self.penalty.coefficient)
            self.penalty.adapt(transfer.to_host(metrics["kl"]).item())
        return metrics

    def _updates(self, rollout: Rollout, advantages: Tensor) -> tuple[list[Metrics], int]:
        """Make a rollout's updates; return the metrics of each, and how many were dropped."""
        rng = self.update_generator()
        updates: list[Metrics] = []
        for number, drawn in enumerate(self._batches(rollout.num_episodes, rng)):
            lanes = drawn[rollout.valid[drawn]]
            if not len(lanes):
                continue
            metrics = self._accumulate(rollout, advantages, lanes, rng)
            if self.stop_kl is not None and transfer.to_host(metrics["approx_kl"]).item() > self.stop_kl:
                self.updates.clear()
                return [*updates, metrics], self.n_epochs * rollout.num_episodes // self.sizes.batch - number
            updates.append(metrics | {"grad_norm": self.updates.apply()})
        return updates, 0

    def _batches(self, num_episodes: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        for _ in range(self.n_epochs):
            yield from self.shuffled(np.arange(num_episodes), rng).reshape(-1, self.sizes.batch)

    def _accumulate(
        self, rollout: Rollout, advantages: Tensor, lanes: np.ndarray, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Accumulate the gradient of one update; return its scalars.

        Args:
            rollout: All of it.
            advantages: [T, B] of each action.
            lanes: The episodes of this update.
            rng: This iteration's generator.
        """
        steps, columns = self.steps.choose(rollout.scored, lanes, rng)
        micro_batches = list(rollout.micro_batches(steps, columns, self.sizes.micro_batch))
        none = rollout.log_probs.new_zeros(0)  # so that a process that has none of these episodes names the same sums
        totals = _Totals()
        totals.add(self.surrogate(none, none, none), none, none)
        has_kl = self.penalty is not None and self.penalty.is_in_the_loss
        if has_kl:
            totals.sums["kl"] = none.sum()
        of_episodes = self._log_ratios_of_episodes(rollout, micro_batches) if self.ratio_of == "trajectory" else None
        num_terms = len(steps)
        if of_episodes is not None:
            num_terms = len(lanes)
            totals.add(*self._terms_of_episodes(rollout, advantages, lanes[rollout.is_here(lanes)], of_episodes))
        self._unlearnt = None  # the update that follows changes the weights
        for step, lane in micro_batches:
            observation = rollout.observation(step, lane)
            distribution = self.policy.distribution(observation)
            log_prob = distribution.log_prob(rollout.action(step, lane), self.reduction)
            if of_episodes is None:
                ratio = (log_prob.detach(), rollout.log_probs[step, lane])
                surrogate = self.surrogate(*ratio, advantages[step, lane])
                totals.add(surrogate, *ratio)
            else:
                log_ratio = of_episodes[lane]
                surrogate = self.surrogate(log_ratio, torch.zeros_like(log_ratio), advantages[step, lane])
            loss = (surrogate.coefficient * log_prob).sum()
            if has_kl:
                kl = self._divergence(rollout, step, lane, distribution, observation).sum()
                totals.sums["kl"] += kl.detach()
                loss = loss + self._kl_weight * kl
            self.updates.backward(loss / num_terms)
        return self._means(totals, num_terms, len(steps))

    def _means(self, totals: "_Totals", num_terms: int, num_steps: int) -> dict[str, Tensor]:
        """Return an update's scalars, of all processes: means over its terms, of the KL divergence over its steps."""
        sums = self.processes.sums(totals.sums)
        means = {name: total / (num_steps if name == "kl" else num_terms) for name, total in sums.items()}
        return means | ratio_metrics([self.processes.concatenate(torch.cat(totals.log_ratios))])

    @torch.no_grad()
    def _log_ratios_of_episodes(self, rollout: Rollout, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Return Σ_t (log π − log π_old) of each episode, [B]: one pass, which a new rollout does not need."""
        if rollout is self._unlearnt:
            return torch.zeros_like(rollout.log_probs[0])
        log_ratios = torch.zeros_like(rollout.log_probs)  # differences are summed: subtracted sums lose their digits
        for step, lane in micro_batches:
            log_prob = self.policy.log_prob(rollout.observation(step, lane), rollout.action(step, lane), self.reduction)
            log_ratios[step, lane] = log_prob - rollout.log_probs[step, lane]
        return log_ratios.sum(0)

    def _terms_of_episodes(
        self, rollout: Rollout, advantages: Tensor, lanes: np.ndarray, log_ratios: Tensor
    ) -> tuple[Surrogate, Tensor, Tensor]:
        """Return the surrogate of whole episodes, with the mean of their actions' advantages, and their log-ratios."""
        index = torch.from_numpy(lanes).to(advantages.device)
        scored = torch.from_numpy(rollout.scored[:, lanes]).to(advantages)
        mean = (advantages[:, index] * scored).sum(0) / scored.sum(0).clamp(min=1)  # they differ with the KL to come
        ratio = (log_ratios[index], torch.zeros_like(log_ratios[index]))
        return self.surrogate(*ratio, mean), *ratio

    def _advantages_of_actions(self, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        """Return the advantage of each action, [T, B], and the rollout's Σ_t KL_t, if it is known by now."""
        kl = None
        if self.penalty is None or not self.penalty.is_measured_first:
            advantages = self.advantages_of(rollout).expand(rollout.num_steps, -1)
        else:
            divergences = self.kl_of_steps(rollout)
            total, coefficient = divergences.sum(0), self.penalty.coefficient
            kl = total.sum() / float(rollout.valid.sum())
            if self.penalty.part.place == "reward":
                paid = dataclasses.replace(rollout, returns=rollout.returns - coefficient * total)
                advantages = self.advantages_of(paid).expand(rollout.num_steps, -1)
            else:
                advantages = self.advantages_of(rollout) + coefficient * later_kl_advantages(divergences)
        if self.steps.weights != "equal":
            advantages = advantages * self.weights_of_steps(rollout)
        return advantages, kl

    def weights_of_steps(self, rollout: Rollout) -> Tensor:
        """Return the inverse sensitivity of each action, [T, B], 0 where there is no density; their mean is 1."""
        scored = torch.from_numpy(rollout.scored).to(rollout.log_probs)
        weights = self.processes.sum(inverse_sensitivities(self.policy, rollout)) * scored
        return weights * (scored.sum() / weights.sum())

    @torch.no_grad()
    def kl_of_steps(self, rollout: Rollout) -> Tensor:
        """Return KL_t of each step, [T, B]; 0 where there is no density."""
        kl = torch.zeros_like(rollout.log_probs)
        steps, lanes = np.nonzero(rollout.scored)
        for step, lane in rollout.micro_batches(steps, lanes, self.sizes.micro_batch):
            observation = rollout.observation(step, lane)
            kl[step, lane] = self._divergence(rollout, step, lane, self.policy.distribution(observation), observation)
        return self.processes.sum(kl)

    @property
    def _kl_weight(self) -> float:
        """What multiplies the sum of KL_t beside a sum of log-probs as they are reduced."""
        assert self.penalty is not None
        dimensions = int(np.prod(self.base_env.single_action_space.shape or ()))
        return self.penalty.coefficient * (1 / dimensions if self.reduction == "mean" else 1.0)

    def _divergence(
        self, rollout: Rollout, steps: Tensor, lanes: Tensor, distribution: Distribution, observation: Observation
    ) -> Tensor:
        """Return KL_t of transitions, [M]; the reference is asked for a rollout's once, if they are needed again."""
        assert self.penalty is not None
        if self._remembered is None or self._remembered.rollout() is not rollout:
            learnt = self.n_epochs * self.steps.fraction if self.penalty.is_in_the_loss else 0
            is_worth_it = learnt + self.penalty.is_measured_first > 1
            self._remembered = (
                RememberedReference(self.penalty.reference, rollout, self.sizes.micro_batch) if is_worth_it else None
            )
        known = None if self._remembered is None else self._remembered.at(steps, lanes)
        return self.penalty.divergence(distribution, observation, known)

    def _collect(self, callbacks: BaseCallback) -> Rollout | None:
        self._remembered = self._unlearnt = None  # each is as large as a rollout
        self._unlearnt = super()._collect(callbacks)
        return self._unlearnt

    def state(self) -> dict[str, Any]:
        """Return the KL's coefficient and the memory of rewards."""
        state: dict[str, Any] = {} if self.penalty is None else {"kl": self.penalty.state_dict()}
        return state if self._memory is None else {**state, "advantages": self._memory.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        if self.penalty is not None:
            self.penalty.load_state_dict(state["kl"])
        if self._memory is not None:
            self._memory.load_state_dict(state["advantages"])

    def tensors(self) -> dict[str, Tensor]:
        """Return those of the memory of rewards: a critic's."""
        return {} if self._memory is None else self._memory.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` returned."""
        if self._memory is not None:
            self._memory.load_tensors(tensors)

    def saved_policies(self) -> Mapping[str, Policy]:
        """Return the reference, where it cannot be made anew."""
        reference = None if self.penalty is None else self.penalty.saved_reference
        return {} if reference is None else {_REFERENCE_FOLDER: reference}


class _Totals:
    """The sums of what an update measures, and the log-ratios that it met."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.log_ratios: list[Tensor] = []

    def add(self, surrogate: Surrogate, log_prob: Tensor, old_log_prob: Tensor) -> None:
        """Count the terms of some transitions or episodes."""
        self.log_ratios.append(log_prob - old_log_prob)
        values = {"loss": surrogate.loss, "approx_kl": approximate_kl(log_prob, old_log_prob), **surrogate.metrics}
        for name, terms in values.items():
            self.sums[name] = self.sums.get(name, terms.new_zeros(())) + terms.sum()
