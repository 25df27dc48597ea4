"""What the policy-gradient algorithms share, which learn from whole trajectories of scored actions."""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor
from typing_extensions import Unpack

from diffusion_gym.transitions import Reduction

from ..experience.environment import check_fit
from ..experience.rollouts import Rollout
from ..experience.seeding import derived_seed
from ..kl import KLPenalty, KLPlace, RememberedReference, later_kl_advantages
from ..logs.diagnostics import Metrics, mean_of
from ..policies import DenoisingPolicy, Policy
from ..policies.base import Observation
from .algorithm import Algorithm
from .options import Options, require_number

StepWeights = Literal["equal", "inverse_sensitivity"]

_WINDOW_STREAM = 3
_REFERENCE_FOLDER = "reference"


def _check_window(size: object, within: object) -> None:
    """Raise ValueError for a range without a window, TypeError for what is no number of steps or no (from, to)."""
    if within is not None and size is None:
        raise ValueError(f"sde_window_range needs sde_window, the number of steps in it; got {within} and None")
    pair = (0, 0) if within is None else within
    sized = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(step, Integral) for step in pair)
    if not sized or not isinstance(size or 0, Integral):
        raise TypeError(
            "sde_window must be None or a whole number of steps, and sde_window_range None or two of them, (from, to); "
            f"got {size} and {within}"
        )


class TrajectoryOptions(Options, total=False):
    """The keywords that every policy-gradient algorithm takes; see `TrajectoryAlgorithm`."""

    timestep_fraction: float
    step_weights: StepWeights
    sde_window: int | None
    sde_window_range: tuple[int, int] | None
    kl_coefficient: float
    kl_place: KLPlace
    reference: Policy | None
    target_kl: float | None
    kl_horizon: float
    stop_kl: float | None


class TrajectoryAlgorithm(Algorithm):
    """A policy-gradient algorithm that learns from trajectories, near a reference policy if asked.

    Args are those of `Algorithm`, and:
        timestep_fraction: Share of each trajectory's steps to learn from, in an order drawn for each.
        step_weights: What multiplies the advantage at each step. "equal", as published: 1. "inverse_sensitivity": the
            inverse of `DenoisingPolicy.sensitivity`, scaled to a mean of 1, so that each step's gradient is noise of
            about the same size. With equal weights the steps whose σ shrinks most give nearly all of the gradient.
            (TempFlow-GRPO weighs by the noise level to the same end, https://arxiv.org/abs/2508.04324.)
        sde_window: So many steps side by side are stochastic, and learnt from; those around them are deterministic
            (η = 0) and have no density. The window is drawn anew for each rollout (Flow-GRPO-Fast: 2 or 3 steps).
            In between the policy samples as it was made. None: all steps.
        sde_window_range: The steps that it lies in, from the first up to before the second; None: the first half, as in
            Flow-GRPO-Fast.
        kl_coefficient: β, the weight of Σ_t KL(π ‖ reference); 0: none. It has one meaning in all places and for both
            reductions of the log-probs: the objective is E[R] − β·E[Σ_t KL_t], in nats, after what is done to the
            advantages ("reward": before). Steps without a density have no KL.
        kl_place: "exact": the gradient of that objective, at the price of one more pass of both policies over the
            rollout; "loss", as published: of the divergences themselves alone; "reward": taken from the return, once,
            at sampling. See `agents.kl.KLPenalty`.
        reference: What the divergence is to, a policy of the same environment; it is frozen, not saved, and to be given
            to `load` again. None: the untrained policy, `policy.reference()`: of a `DenoisingPolicy` the model that it
            was made from (with LoRA: its adapter off), without a copy; of others a copy made now, part of a checkpoint.
            Where it is needed more than once (kl_place="exact", n_epochs above 1) what it says of a rollout is kept
            beside it: as much memory as its actions take.
        target_kl: Adapt β after each rollout, so that Σ_t KL_t (the log's `train/kl`) becomes this, in nats.
        kl_horizon: β ← β·(1 + e/kl_horizon), e = clip(KL/target_kl − 1, ±0.2): 10, as published, is 2 % a rollout at
            the most.
        stop_kl: Before an update whose `train/approx_kl` (k3, of the log-probs as they are reduced) to the policy that
            sampled is above this, drop it and the rest of the rollout's; `train/early_stopped` counts them. (SB3's PPO:
            1.5·`target_kl`.) Waits for the device once an update.

    Raises:
        TypeError, ValueError: as `Algorithm`.
    """

    def __init__(
        self,
        policy: Policy,
        env: VectorEnv,
        *,
        log_prob_reduction: Reduction,
        own: Mapping[str, Any],
        n_epochs: int,
        timestep_fraction: float = 1.0,
        step_weights: StepWeights = "equal",
        sde_window: int | None = None,
        sde_window_range: tuple[int, int] | None = None,
        kl_coefficient: float = 0.0,
        kl_place: KLPlace = "loss",
        reference: Policy | None = None,
        target_kl: float | None = None,
        kl_horizon: float = 10.0,
        stop_kl: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        _check_window(sde_window, sde_window_range)
        shared = {
            "timestep_fraction": timestep_fraction,
            "step_weights": step_weights,
            "sde_window": sde_window,
            "sde_window_range": None if sde_window_range is None else list(sde_window_range),
            "kl_coefficient": kl_coefficient,
            "kl_place": kl_place,
            "target_kl": target_kl,
            "kl_horizon": kl_horizon,
            "stop_kl": stop_kl,
        }
        super().__init__(
            policy, env, log_prob_reduction=log_prob_reduction, n_epochs=n_epochs, own={**own, **shared}, **options
        )
        require_number("(0, 1]", timestep_fraction=timestep_fraction)
        require_number("(0, inf)", none=True, stop_kl=stop_kl)
        self.timestep_fraction = timestep_fraction
        self.step_weights: StepWeights = step_weights
        self._check_step_weights(kl_place)
        self.stop_kl = stop_kl
        self.kl = KLPenalty(
            policy,
            kl_coefficient=kl_coefficient,
            kl_place=kl_place,
            reference=reference,
            target_kl=target_kl,
            kl_horizon=kl_horizon,
        )
        if self.kl.reference is not None:
            check_fit(env, self.kl.reference)
            self.processes.join(list(self.kl.reference.parameters()))
        dimensions = int(np.prod(env.single_action_space.shape))  # type: ignore[arg-type]
        self._per_log_prob = 1 / dimensions if log_prob_reduction == "mean" else 1.0
        self._remembered: RememberedReference | None = None
        self.sde_window = sde_window
        self.sde_window_range = self._window_range(sde_window_range)

    # ------------------------------------------------------------------ what an algorithm has to provide
    @abstractmethod
    def _advantages(self, rollout: Rollout) -> Tensor:
        """Return the advantage of each episode, [B]."""

    @abstractmethod
    def _accumulate(
        self, rollout: Rollout, advantages: Tensor, lanes: np.ndarray, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Accumulate the gradient of one update from whole episodes; return its scalars.

        Args:
            rollout: All of it.
            advantages: [T, B] of each action.
            lanes: The episodes.
            rng: This iteration's generator.

        Returns:
            `loss` and `approx_kl`; `kl`, the mean of KL_t over transitions, where that is in the loss; and others.
        """

    @property
    def _kl_weight(self) -> float:
        """What multiplies the sum of KL_t beside a sum of log-probs as they are reduced."""
        return self.kl.coefficient * self._per_log_prob

    # ------------------------------------------------------------------ steps that count more, or less
    def _check_step_weights(self, kl_place: KLPlace) -> None:
        if self.step_weights not in get_args(StepWeights):
            raise ValueError(f"step_weights must be one of {get_args(StepWeights)}, got {self.step_weights!r}")
        if self.step_weights == "equal":
            return
        if not isinstance(self.policy, DenoisingPolicy) or not self.env.metadata.get("action_is_next_latents"):
            raise ValueError(
                f"step_weights={self.step_weights!r} needs a DenoisingPolicy in DenoisingMDP-v0, "
                f"got {type(self.policy).__name__}"
            )
        if kl_place == "exact":
            raise ValueError(
                'kl_place="exact" asks for the gradient of one objective, in which all steps count the same: give '
                f'kl_place="loss" or "reward" with step_weights={self.step_weights!r}'
            )

    def weights_of_steps(self, rollout: Rollout) -> Tensor:
        """Return the inverse sensitivity of each action, [T, B], 0 where there is no density; their mean is 1."""
        assert isinstance(self.policy, DenoisingPolicy)
        times = (rollout.changing[key].squeeze(-1) for key in ("timestep", "next_timestep"))
        weights = torch.zeros_like(rollout.log_probs)
        weights[: len(rollout.actions), rollout.lanes_here] = (1 / self.policy.sensitivity(*times)).to(weights)
        scored = torch.from_numpy(rollout.scored).to(weights)
        weights = self.processes.sum(weights) * scored
        return weights * (scored.sum() / weights.sum())

    # ------------------------------------------------------------------ the stochastic window
    def _window_range(self, given: tuple[int, int] | None) -> tuple[int, int]:
        if self.sde_window is None:
            return (0, 0)
        if not isinstance(self.policy, DenoisingPolicy) or not self.env.metadata.get("action_is_next_latents"):
            raise ValueError(f"sde_window needs a DenoisingPolicy in DenoisingMDP-v0, got {type(self.policy).__name__}")
        num_steps = self.env.unwrapped.num_steps  # type: ignore[attr-defined]
        low, high = (0, max(num_steps // 2, self.sde_window)) if given is None else given
        if not 0 <= low < low + self.sde_window <= high <= num_steps:
            raise ValueError(
                f"sde_window must be at least 1 step and fit into sde_window_range, within the {num_steps} steps of an "
                f"episode; got {self.sde_window} and {(low, high)}"
            )
        times = self._times()
        scored = self.policy.scored({"timestep": times[:-1], "next_timestep": times[1:]})
        if not scored[high - self.sde_window : high].any():
            raise ValueError(
                f"sde_window_range {(low, high)} allows a window of {self.sde_window} steps without a density: "
                f"steps {np.flatnonzero(~scored).tolist()} have none"
            )
        return low, high

    @property
    def behaviour(self) -> Policy:
        """The policy that is trained; with a window deterministic outside this iteration's."""
        if self.sde_window is None:
            return self.policy
        assert isinstance(self.policy, DenoisingPolicy)
        return self.policy.windowed(*self._window(self.sde_window))

    def _window(self, size: int) -> tuple[float, float]:
        """Return the times between which this iteration's steps are stochastic."""
        low, high = self.sde_window_range
        start = low + derived_seed(self.seed, _WINDOW_STREAM, self.iteration) % (high - low - size + 1)
        times = self._times()
        return float(times[start]), float(times[start + size])

    def _times(self) -> Tensor:
        assert isinstance(self.policy, DenoisingPolicy)
        return self.policy.model.schedule.timesteps(self.env.unwrapped.num_steps).float()  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ updates
    def train(self, rollout: Rollout) -> Metrics:
        """Update the policy from one rollout: `n_epochs` passes, one update per `batch_size` episodes."""
        measured, advantages = self._advantages_of_actions(rollout)
        if self.step_weights != "equal":
            advantages = advantages * self.weights_of_steps(rollout)
        updates, num_updates = self._updates(rollout, advantages)
        found = {**mean_of(updates)}
        if self.kl.place == "loss" and "kl" in found:
            found["kl"] = found["kl"] * float(rollout.scored.sum() / rollout.valid.sum())
        found |= measured
        if self.stop_kl is not None:
            planned = self.n_epochs * rollout.num_episodes // self.batch_size
            found["early_stopped"] = advantages.new_tensor(planned - num_updates)
        if self.kl.target_kl is not None:
            found["kl_coefficient"] = advantages.new_tensor(self.kl.coefficient)
            self.kl.adapt(self._read(found["kl"]))
        return found

    def _updates(self, rollout: Rollout, advantages: Tensor) -> tuple[list[Metrics], int]:
        """Make a rollout's updates; return what each measured, and how many there were."""
        rng = self._update_generator()
        updates: list[Metrics] = []
        for drawn in self._batches(rollout.num_episodes, rng):
            lanes = drawn[rollout.valid[drawn]]
            if not len(lanes):
                continue
            metrics = self._accumulate(rollout, advantages, lanes, rng)
            if self.stop_kl is not None and self._read(metrics["approx_kl"]) > self.stop_kl:
                self.guard.clear(self.optimizer)
                return [*updates, metrics], len(updates)
            updates.append(metrics | {"grad_norm": self.optimizer_step()})
        return updates, len(updates)

    @staticmethod
    def _read(value: Tensor) -> float:
        """Read a scalar from the device: waits for it."""
        return float(value)

    def _batches(self, num_episodes: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        for _ in range(self.n_epochs):
            yield from self._shuffled(np.arange(num_episodes), rng).reshape(-1, self.batch_size)

    def _advantages_of_actions(self, rollout: Rollout) -> tuple[dict[str, Tensor], Tensor]:
        """Return the rollout's KL, if it is known by now, and the advantage of each action, [T, B]."""
        if not self.kl.is_measured_first:
            return {}, self._of_valid(rollout).expand(rollout.num_steps, -1)
        kl = self.kl_of_steps(rollout)
        total = kl.sum(0)
        measured = {"kl": total.sum() / float(rollout.valid.sum())}
        if self.kl.place == "reward":
            paid = dataclasses.replace(rollout, returns=rollout.returns - self.kl.coefficient * total)
            return measured, self._of_valid(paid).expand(rollout.num_steps, -1)
        return measured, self._of_valid(rollout) + self.kl.coefficient * later_kl_advantages(kl)

    def _of_valid(self, rollout: Rollout) -> Tensor:
        """Return the advantage of each episode, [B]: 0 where there is no valid reward, which count for no other's."""
        if rollout.valid.all():
            return self._advantages(rollout)
        kept = torch.from_numpy(np.flatnonzero(rollout.valid)).to(rollout.returns.device)
        valid = rollout.valid[rollout.valid]
        part = dataclasses.replace(
            rollout, returns=rollout.returns[kept], prompt_id=rollout.prompt_id[rollout.valid], valid=valid
        )
        advantages = self._advantages(part)
        return advantages.new_zeros(rollout.num_episodes).index_copy(0, kept, advantages)

    @torch.no_grad()
    def kl_of_steps(self, rollout: Rollout) -> Tensor:
        """Return KL_t of each step, [T, B]; 0 where there is no density."""
        kl = torch.zeros_like(rollout.log_probs)
        steps, lanes = np.nonzero(rollout.scored)
        for k, b in rollout.micro_batches(steps, lanes, self.micro_batch_size):
            observation = rollout.observation(k, b)
            kl[k, b] = self._divergence(rollout, k, b, self.policy.distribution(observation), observation)
        return self.processes.sum(kl)

    def _divergence(
        self, rollout: Rollout, k: Tensor, b: Tensor, distribution: Any, observation: Observation
    ) -> Tensor:
        """Return KL_t of transitions, [M]; the reference is asked for a rollout's once, if they are needed again."""
        if self._remembered is None or self._remembered.rollout() is not rollout:
            learnt = self.n_epochs * self.timestep_fraction if self.kl.is_in_the_loss else 0
            passes, size = learnt + self.kl.is_measured_first, self.micro_batch_size
            self._remembered = self.kl.remembered(self.policy, rollout, passes=passes, micro_batch_size=size)
        known = None if self._remembered is None else self._remembered.at(k, b)
        return self.kl.divergence(distribution, observation, known)

    def _collect(self, callbacks: BaseCallback) -> Rollout | None:
        self._remembered = None  # it is as large as a rollout
        return super()._collect(callbacks)

    def _transitions(
        self, scored: np.ndarray, lanes: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps, lanes) of the transitions to learn from, [M] each, shuffled.

        Each trajectory gives the first `timestep_fraction` of its own random order of time, as in ddpo-pytorch; of the
        times at which there is a density.

        Raises:
            ValueError: no action has a density.
        """
        times = np.flatnonzero(scored.any(1))
        kept = max(1, int(len(times) * self.timestep_fraction))
        steps = np.stack([rng.permutation(times)[:kept] for _ in lanes], axis=1)
        columns = np.broadcast_to(lanes, steps.shape)
        usable = scored[steps, columns]
        if not usable.any():
            raise ValueError("none of the actions to learn from has a density: give the policy eta > 0")
        order = rng.permutation(int(usable.sum()))
        return steps[usable][order], columns[usable][order]

    # ------------------------------------------------------------------ files
    def _extra_state(self) -> dict[str, Any]:
        return {"kl": self.kl.state_dict()} if self.kl.reference is not None else {}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        if self.kl.reference is not None:
            self.kl.load_state_dict(state["kl"])

    def _save_files(self, folder: Path) -> None:
        if self.kl.saved_reference is not None:
            self.kl.saved_reference.save(folder / _REFERENCE_FOLDER)

    def _load_files(self, folder: Path) -> None:
        if self.kl.saved_reference is not None:
            self.kl.saved_reference.load_weights(folder / _REFERENCE_FOLDER)
