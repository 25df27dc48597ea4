"""Denoising diffusion policy optimisation (DDPO): the score-function and the importance-sampled estimator.

Source: Black et al., 2023, "Training Diffusion Models with Reinforcement Learning", https://arxiv.org/abs/2305.13301.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from typing_extensions import Unpack

from diffusion_gym.transitions import Reduction

from .advantages import PerPromptStats, clip_advantages, normalise, texts_of
from .experience.rollouts import Rollout
from .logs.diagnostics import ratio_metrics
from .losses import approximate_kl, clipped_surrogate_loss, score_function_loss
from .policies import Policy
from .training.options import require_number, require_used
from .training.policy_gradient import TrajectoryAlgorithm, TrajectoryOptions


class DDPOOptions(TrajectoryOptions, total=False):
    """The keywords that both estimators take; see `DDPOSF`."""

    advantage_clip: float | None
    center_advantages: bool
    per_prompt_buffer_size: int | None
    per_prompt_min_count: int
    log_prob_reduction: Reduction


class _DDPO(TrajectoryAlgorithm):
    """What the two estimators share: advantages, minibatches of whole trajectories, accumulated gradients."""

    def __init__(
        self,
        policy: Policy,
        env: VectorEnv,
        *,
        own: Mapping[str, Any],
        n_epochs: int = 1,
        advantage_clip: float | None = 5.0,
        center_advantages: bool = False,
        per_prompt_buffer_size: int | None = 16,
        per_prompt_min_count: int = 16,
        log_prob_reduction: Reduction = "mean",
        **options: Unpack[TrajectoryOptions],
    ) -> None:
        shared = {
            "n_epochs": n_epochs,
            "advantage_clip": advantage_clip,
            "center_advantages": center_advantages,
            "per_prompt_buffer_size": per_prompt_buffer_size,
            "per_prompt_min_count": per_prompt_min_count,
            "log_prob_reduction": log_prob_reduction,
        }
        options.setdefault("samples_per_epoch", 256)
        super().__init__(
            policy, env, log_prob_reduction=log_prob_reduction, n_epochs=n_epochs, own={**shared, **own}, **options
        )
        require_number("(0, inf)", none=True, advantage_clip=advantage_clip)
        require_used(
            "the statistics of prompts: give per_prompt_buffer_size",
            per_prompt_buffer_size is not None,
            center_advantages=(center_advantages, False),
            per_prompt_min_count=(per_prompt_min_count, 16),
        )
        self.advantage_clip = advantage_clip
        self.center_advantages = center_advantages
        self.per_prompt_stats = (
            None if per_prompt_buffer_size is None else PerPromptStats(per_prompt_buffer_size, per_prompt_min_count)
        )

    @abstractmethod
    def _loss(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
        """Return the loss of each transition, [M]."""

    def _advantages(self, rollout: Rollout) -> Tensor:
        """Return the advantage of each episode, [B], within ±`advantage_clip`."""
        return clip_advantages(self._normalised(rollout), self.advantage_clip)

    def _normalised(self, rollout: Rollout) -> Tensor:
        if self.per_prompt_stats is None:
            return normalise(rollout.returns)
        prompts = texts_of(rollout.prompt_id, self.env.unwrapped.prompts)  # type: ignore[attr-defined]
        advantages = self.per_prompt_stats.update(prompts, self._read_rewards(rollout.returns))
        if self.center_advantages:
            advantages -= advantages.mean()
        return torch.from_numpy(advantages).to(rollout.returns.device)

    @staticmethod
    def _read_rewards(returns: Tensor) -> list[float]:
        """Read the rewards from the device: waits for it."""
        return returns.tolist()

    def _accumulate(
        self, rollout: Rollout, advantages: Tensor, lanes: np.ndarray, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Accumulate the gradient of one update from whole trajectories; transitions go through in micro-batches."""
        steps, columns = self._transitions(rollout.scored, lanes, rng)
        none = rollout.log_probs.new_zeros(0)
        log_ratios = [none]
        totals = {name: none.sum() for name in ("loss", *(["kl"] if self.kl.is_in_the_loss else []))}
        totals |= self._metrics(none, none)
        for k, b in rollout.micro_batches(steps, columns, self.micro_batch_size):
            observation = rollout.observation(k, b)
            distribution = self.policy.distribution(observation)
            log_prob = distribution.log_prob(rollout.action(k, b), self.log_prob_reduction)
            old_log_prob = rollout.log_probs[k, b]
            loss = self._loss(log_prob, old_log_prob, advantages[k, b]).sum()
            shares = {"loss": loss.detach()} | self._metrics(log_prob.detach(), old_log_prob)
            if self.kl.is_in_the_loss:
                kl = self._divergence(rollout, k, b, distribution, observation).sum()
                shares["kl"] = kl.detach()
                loss = loss + self._kl_weight * kl
            self.backward(loss / len(steps))
            log_ratios.append(log_prob.detach() - old_log_prob)
            for name, share in shares.items():
                totals[name] += share
        means = {name: total / len(steps) for name, total in self.processes.sums(totals).items()}
        return means | ratio_metrics([self.processes.concatenate(torch.cat(log_ratios))])

    def _metrics(self, log_prob: Tensor, old_log_prob: Tensor) -> dict[str, Tensor]:
        """Return what is logged of some transitions, each summed over them."""
        return {"approx_kl": approximate_kl(log_prob, old_log_prob).sum()}

    def _extra_state(self) -> dict[str, Any]:
        own = {} if self.per_prompt_stats is None else {"per_prompt_stats": self.per_prompt_stats.state_dict()}
        return super()._extra_state() | own

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        super()._load_extra_state(state)
        if self.per_prompt_stats is not None:
            self.per_prompt_stats.load_state_dict(state["per_prompt_stats"])


@final
class DDPOSF(_DDPO):
    """DDPO with the score-function estimator (REINFORCE): strictly on-policy, one update per rollout by default.

    ∇J = E[ Σ_t ∇log p_θ(x_{t−1} | x_t, c)·A ], averaged over trajectories and, as in the published code, over time
    and (with `log_prob_reduction="mean"`) over dimensions, which is the paper's up to a factor.

    Source: Black et al., 2023, eq. 4, https://arxiv.org/abs/2305.13301. No published code has it as its own loss.

    Args are those of `TrajectoryAlgorithm` (paper: a learning rate of 1e-5, with LoRA 3e-4; 256 samples per rollout,
    the default here), and:
        advantage_clip: Advantages are clamped to ±this; None: not at all. The paper does not say; ddpo-pytorch's 5
            is the default here, the authors' JAX code has 10.
        center_advantages: Subtract the batch's mean from the per-prompt advantages. Statistics over past rollouts lag
            behind a reward that moves; the common offset that this leaves adds variance and nothing else. Off by
            default: no published code does it.
        per_prompt_buffer_size: Rewards remembered per prompt for its own mean and standard deviation; None: normalise
            over the batch, which centres the advantages already. ddpo-pytorch: 16 (32 for aesthetics and alignment).
        per_prompt_min_count: Rewards from which on a prompt is compared to itself.
        log_prob_reduction: "mean" over a latent's dimensions, as the published codes do, or "sum", as the paper
            writes: their authors report that it diverges at once at 16,384 dimensions. For times, which are one
            number, both are the same.

    With a `batch_size` below `samples_per_epoch` the later updates from a rollout are off-policy, which this estimator
    does not correct.

    Raises:
        TypeError, ValueError: as `TrajectoryAlgorithm`.
    """

    def __init__(self, policy: Policy, env: VectorEnv, **options: Unpack[DDPOOptions]) -> None:
        super().__init__(policy, env, own={}, **options)

    def _loss(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
        return score_function_loss(log_prob, advantages)


@final
class DDPOIS(_DDPO):
    """DDPO with the importance-sampled estimator: several updates per rollout, with PPO's clipped ratio.

    L = E[ max(−A·ρ, −A·clip(ρ, 1 ± clip_range)) ], ρ = p_θ(x_{t−1} | x_t, c) / p_old(x_{t−1} | x_t, c).

    Source: Black et al., 2023, eq. 5 and appendix D, https://arxiv.org/abs/2305.13301; ddpo-pytorch train.py.

    Args are those of `DDPOSF`, but:
        batch_size: Images per optimizer step. Paper, and the default: 64 of 256, so 4 updates per rollout.
        n_epochs: Passes over a rollout (ddpo-pytorch: `num_inner_epochs`).
        clip_range: c, of the ratio of *mean* log-probs over the D dimensions: the true ratio is clipped at
            exp(± D·c). The published 1e-4 is for D = 16,384 (Stable Diffusion's latents); for the same with the
            emoji's 1,024 take 1.6e-3, since with 1e-4 nearly all of a rollout's second update is clipped.

    Raises:
        TypeError, ValueError: as `TrajectoryAlgorithm`.
    """

    def __init__(
        self,
        policy: Policy,
        env: VectorEnv,
        *,
        n_epochs: int = 1,
        clip_range: float = 1e-4,
        **options: Unpack[DDPOOptions],
    ) -> None:
        require_number("(0, inf)", clip_range=clip_range)
        options.setdefault("batch_size", 64)
        super().__init__(policy, env, n_epochs=n_epochs, own={"clip_range": clip_range}, **options)
        self.clip_range = clip_range

    def _loss(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
        return clipped_surrogate_loss(log_prob, old_log_prob, advantages, clip_range=self.clip_range)

    def _metrics(self, log_prob: Tensor, old_log_prob: Tensor) -> dict[str, Tensor]:
        outside = (torch.exp(log_prob - old_log_prob) - 1).abs() > self.clip_range
        return super()._metrics(log_prob, old_log_prob) | {"clip_fraction": outside.float().sum()}
