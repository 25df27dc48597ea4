"""REINFORCE leave-one-out (RLOO): groups of samples of one prompt are each other's baseline.

Source: Ahmadian et al., 2024, "Back to Basics: Revisiting REINFORCE Style Optimization", https://arxiv.org/abs/2402.14740;
as Ye et al., 2024 (TPDM), https://arxiv.org/abs/2412.01243, use it to train a time predictor.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, final, get_args

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor
from typing_extensions import Unpack

from diffusion_gym.transitions import Reduction

from .advantages import AdvantageScale, GroupBaseline, clip_advantages, group_advantages
from .experience.rollouts import Rollout
from .experience.starts import Starts
from .logs.diagnostics import ratio_metrics
from .losses import approximate_kl, clipped_surrogate_coefficients, clipped_surrogate_loss
from .policies import Policy
from .training.options import require_number, require_used, require_whole
from .training.policy_gradient import TrajectoryAlgorithm, TrajectoryOptions

Ratio = Literal["trajectory", "step"]

_CHOICES = {"ratio": Ratio, "baseline": GroupBaseline, "advantage_scale": AdvantageScale}
_DEFAULT_CLIP = {"trajectory": 0.2, "step": 1e-4}


@final
class RLOO(TrajectoryAlgorithm):
    """RLOO with PPO's clipped ratio, of whole trajectories or of steps; for any policy and any of the environments.

        A_k = R_k − mean_{j≠k} R_j                                            among the K samples of a prompt
        trajectory:  L = E[ max(−A·ρ, −A·clip(ρ, 1 ± c)) ],  ρ = Π_t π(a_t|s_t) / π_old(a_t|s_t)
        step:        the same with each step's own ρ_t

    A trajectory's gradient takes two passes over its steps: one without gradients for ρ, which the first update from a
    rollout does not need (ρ = 1), and one that goes back step by step with the coefficient that ρ gives. Memory is that
    of `micro_batch_size` transitions, however long it is.

    Flow-GRPO is a setting: baseline="group_mean", advantage_scale="global", advantage_clip=5, same_noise=False,
    ratio="step", clip_range=1e-4, and kl_coefficient=0.04/T for T steps. (Its published 0.04 multiplies KL_t·|Δt|, for
    its code leaves Δt out of the variance; here the KL divergence is in nats, and |Δt| is about 1/T.) Its paper divides
    by the group's standard deviation, advantage_scale="group", its configurations by that of all rewards. What it has
    besides: it leaves out samples whose advantage is 0, and the last step. Flow-GRPO-Fast adds sde_window=2.

    DPOK is ratio="step", clip_range=1e-4, n_epochs=5, kl_place="loss", kl_coefficient=β/α of its KL weight β and reward
    weight α (its code: 0.01/100; that has a learned value function for a baseline, and for the KL the squared distance
    of the predicted noises, which weighs the steps otherwise).

    Whole groups are launched together and run to their ends. Ended lanes therefore must wait: the environment is to be
    made with autoreset_mode "DISABLED". (Learning from the first episodes to end would teach short episodes.)

    Source: Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740; Ye et al., 2024, section 3.3,
    https://arxiv.org/abs/2412.01243; Liu et al., 2025 (Flow-GRPO), https://arxiv.org/abs/2505.05470; Fan et al., 2023
    (DPOK), https://arxiv.org/abs/2305.16381.

    Args are those of `TrajectoryAlgorithm`, and:
        env: With autoreset_mode DISABLED.
        group_size: K ≥ 2 samples of a prompt, a divisor of `env.num_envs` (4; Flow-GRPO: 24).
        learning_rate: 1e-4 here, for heads and LoRA (a whole UNet: 1e-5, the default of the others).
        adam_weight_decay: 0 here: it would pull a head's weights, which begin at 0, back to its first schedule.
        same_noise: Start the samples of a group from the same noise, so that they differ by the policy's draws alone.
        num_starts: Draw the groups' starts (prompt and noise) from this many; None: always new ones. With
            reward="reference_distance" a start that comes again costs no new reference.
        n_epochs: Passes over a rollout (TPDM: 4).
        ratio: "trajectory" or "step"; None: "step" where the action is the next latents, else "trajectory". A
            trajectory of latents is of so many dimensions that after one update its ratio is next to 0 or immense: with
            more than one update of a rollout there is a warning.
        clip_range: c; None: 0.2 for trajectories (TPDM), 1e-4 for steps.
        baseline: "leave_one_out", or GRPO's "group_mean" (see `agents.advantages.group_advantages`).
        advantage_scale: Divide the advantages by "none", by their standard deviation over the "rollout", by that of all
            its rewards ("global"), or by that of each "group" (GRPO). The published RLOO codes do not; Adam makes up
            for most of a reward's scale.
        advantage_clip: Advantages are clamped to ±this (Flow-GRPO: 5); None: not at all.
        log_prob_reduction: Over an action's dimensions. None: "mean" where the action is the next latents and `ratio`
            is "step", as the published codes do; else "sum". For times, which are one number, both are the same.
        timestep_fraction, step_weights: Below 1, or not "equal", they go with ratio="step" alone.
        reference: For times also a `ContextFreeSchedule` made from a grid (TPDM's; its launch script has no KL).

    Raises:
        TypeError, ValueError: as `TrajectoryAlgorithm`; or the environment resets its lanes itself.
    """

    def __init__(
        self,
        policy: Policy,
        env: VectorEnv,
        *,
        same_noise: bool = True,
        num_starts: int | None = None,
        n_epochs: int = 1,
        ratio: Ratio | None = None,
        clip_range: float | None = None,
        baseline: GroupBaseline = "leave_one_out",
        advantage_scale: AdvantageScale = "none",
        advantage_clip: float | None = None,
        log_prob_reduction: Reduction | None = None,
        **options: Unpack[TrajectoryOptions],
    ) -> None:
        moves_latents = bool(env.metadata.get("action_is_next_latents"))
        self.ratio: Ratio = ratio or ("step" if moves_latents else "trajectory")
        by_mean = moves_latents and self.ratio == "step"
        own = {
            "same_noise": same_noise,
            "num_starts": num_starts,
            "n_epochs": n_epochs,
            "ratio": ratio,
            "clip_range": clip_range,
            "baseline": baseline,
            "advantage_scale": advantage_scale,
            "advantage_clip": advantage_clip,
            "log_prob_reduction": log_prob_reduction,
        }
        options.setdefault("group_size", 4)
        options.setdefault("learning_rate", 1e-4)
        options.setdefault("adam_weight_decay", 0.0)
        super().__init__(
            policy,
            env,
            log_prob_reduction=log_prob_reduction or ("mean" if by_mean else "sum"),
            n_epochs=n_epochs,
            own=own,
            **options,
        )
        self.same_noise = same_noise
        self.num_starts = num_starts
        self.baseline: GroupBaseline = baseline
        self.advantage_scale: AdvantageScale = advantage_scale
        self.advantage_clip = advantage_clip
        self._check_choices()
        self.clip_range = _DEFAULT_CLIP[self.ratio] if clip_range is None else clip_range
        self._check()
        self._unlearnt: Rollout | None = None  # a rollout that was drawn with the weights as they are

    def _check_choices(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}")

    def _check(self) -> None:
        if self.env.metadata["autoreset_mode"] is not AutoresetMode.DISABLED:
            raise ValueError(
                "RLOO launches whole groups and lets them end: make the environment with "
                f'autoreset_mode="DISABLED", got {self.env.metadata["autoreset_mode"].name}'
            )
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {self.group_size}")
        require_whole(1, none=True, num_starts=self.num_starts)
        if self.num_starts is not None and self.settings.prompt_sampling != "random":
            raise ValueError('num_starts draws prompt and noise together: leave prompt_sampling at "random"')
        require_number("(0, inf)", clip_range=self.clip_range)
        require_number("(0, inf)", none=True, advantage_clip=self.advantage_clip)
        divided_out = 'another advantage_scale, for the factor by which baselines differ is divided out of "rollout"'
        is_free = self.advantage_scale != "rollout"
        require_used(divided_out, is_free, baseline=(self.baseline, "leave_one_out"))
        if self.ratio == "trajectory" and (self.timestep_fraction < 1 or self.step_weights != "equal"):
            raise ValueError(
                'timestep_fraction and step_weights go with ratio="step": the ratio of a trajectory is that of all its '
                f"steps; got {self.timestep_fraction} and {self.step_weights!r}"
            )
        num_updates = self.n_epochs * self.samples_per_epoch // self.batch_size
        if self.ratio == "trajectory" and self.env.metadata.get("action_is_next_latents") and num_updates > 1:
            warnings.warn(
                f"the ratio of a whole trajectory of latents is next to 0 or immense after one update, and there are "
                f'{num_updates} from each rollout: ratios are bounded at e^±20, but give ratio="step", or n_epochs=1 '
                "and batch_size=samples_per_epoch",
                stacklevel=4,
            )

    # ------------------------------------------------------------------ groups
    def _starts(self) -> Starts:
        starts = super()._starts()
        rollouts = replace(starts.rollouts, same_noise=self.same_noise, num_starts=self.num_starts)
        return replace(starts, rollouts=rollouts)

    def _advantages(self, rollout: Rollout) -> Tensor:
        """Return the advantage of each episode, [B]."""
        groups = rollout.returns.reshape(-1, self.group_size)
        advantages = group_advantages(groups, baseline=self.baseline, scale=self.advantage_scale).flatten()
        return clip_advantages(advantages, self.advantage_clip)

    def _of_valid(self, rollout: Rollout) -> Tensor:
        return self._advantages(rollout)  # groups know what to do with a NaN

    # ------------------------------------------------------------------ updates
    def _collect(self, callbacks: BaseCallback) -> Rollout | None:
        self._unlearnt = super()._collect(callbacks)
        return self._unlearnt

    def _accumulate(
        self, rollout: Rollout, advantages: Tensor, lanes: np.ndarray, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Accumulate the gradient of one update from whole episodes; transitions go through in micro-batches."""
        steps, columns = self._transitions(rollout.scored, lanes, rng)
        parts = list(rollout.micro_batches(steps, columns, self.micro_batch_size))
        sums = {name: advantages.new_zeros(()) for name in ("loss", "approx_kl", "clip_fraction", "kl")}
        log_ratios = [rollout.log_probs.new_zeros(0)]
        coefficients, num_terms = None, len(steps)
        if self.ratio == "trajectory":
            coefficients = self._trajectory_coefficients(
                rollout, advantages, lanes[rollout.is_here(lanes)], parts, sums, log_ratios
            )
            num_terms = len(lanes)
        self._unlearnt = None  # the update that follows changes the weights
        for k, b in parts:
            observation = rollout.observation(k, b)
            distribution = self.policy.distribution(observation)
            log_prob = distribution.log_prob(rollout.action(k, b), self.log_prob_reduction)
            if coefficients is None:
                transitions = (log_prob, rollout.log_probs[k, b])
                loss = clipped_surrogate_loss(*transitions, advantages[k, b], clip_range=self.clip_range).sum()
                self._count(sums, log_ratios, loss, *transitions)
            else:
                loss = (coefficients[k, b] * log_prob).sum()
            if self.kl.is_in_the_loss:
                kl = self._divergence(rollout, k, b, distribution, observation).sum()
                sums["kl"] += kl.detach()
                loss = loss + self._kl_weight * kl
            self.backward(loss / num_terms)
        means = {name: total / num_terms for name, total in self.processes.sums(sums).items()}
        kl_mean = means.pop("kl") * (num_terms / len(steps))
        means |= ratio_metrics([self.processes.concatenate(torch.cat(log_ratios))])
        return means | {"kl": kl_mean} if self.kl.is_in_the_loss else means

    def _transitions(
        self, scored: np.ndarray, lanes: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.timestep_fraction < 1:
            return super()._transitions(scored, lanes, rng)
        steps, columns = np.nonzero(scored[:, lanes])
        if not len(steps):
            raise ValueError("none of the actions has a density: give the policy eta > 0, or one that can be trained")
        return steps, lanes[columns]

    @torch.no_grad()
    def _trajectory_coefficients(
        self,
        rollout: Rollout,
        advantages: Tensor,
        lanes: np.ndarray,
        parts: Sequence[tuple[Tensor, Tensor]],
        sums: dict[str, Tensor],
        log_ratios: list[Tensor],
    ) -> Tensor:
        """Return what multiplies the log-prob of each step, [T, B]: the episode's ratio, and the step's advantage."""
        each = torch.zeros_like(advantages)  # differences are summed: sums, subtracted, would lose their digits
        for k, b in parts if self._unlearnt is not rollout else ():
            log_prob = self.policy.log_prob(rollout.observation(k, b), rollout.action(k, b), self.log_prob_reduction)
            each[k, b] = log_prob - rollout.log_probs[k, b]
        log_ratio = each.sum(0)
        index = torch.from_numpy(lanes).to(advantages.device)
        trajectory = (log_ratio[index], torch.zeros_like(log_ratio[index]))
        scored = torch.from_numpy(rollout.scored[:, lanes]).to(advantages)
        mean = (advantages[:, index] * scored).sum(0) / scored.sum(0).clamp(min=1)  # they differ with the KL to come
        loss = clipped_surrogate_loss(*trajectory, mean, clip_range=self.clip_range)
        self._count(sums, log_ratios, loss.sum(), *trajectory)
        ratios = log_ratio.expand_as(advantages).flatten()
        coefficients = clipped_surrogate_coefficients(
            ratios, torch.zeros_like(ratios), advantages.flatten(), clip_range=self.clip_range
        )
        return coefficients.reshape(advantages.shape)

    def _count(
        self,
        sums: dict[str, Tensor],
        log_ratios: list[Tensor],
        loss: Tensor,
        log_prob: Tensor,
        old_log_prob: Tensor,
    ) -> None:
        log_prob = log_prob.detach()
        log_ratios.append(log_prob - old_log_prob)
        outside = (torch.exp(log_prob - old_log_prob) - 1).abs() > self.clip_range
        sums["loss"] += loss.detach()
        sums["approx_kl"] += approximate_kl(log_prob, old_log_prob).sum()
        sums["clip_fraction"] += outside.float().sum()
