"""DiffusionNFT: reinforcement learning on the forward process, without likelihoods, trajectories or a fixed sampler.

Source: Zheng et al., 2025, "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
https://arxiv.org/abs/2509.16117; NVlabs/DiffusionNFT.
"""

import copy
from pathlib import Path
from typing import final

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from typing_extensions import Unpack

from diffusion_gym.predictions import broadcast_to

from .advantages import PerPromptStats, grouped_by_prompt, texts_of, warn_of_lonely
from .experience.replay import Replay
from .experience.rollouts import Rollout
from .logs.diagnostics import Metrics, mean_of
from .policies import DenoisingPolicy, Policy
from .training.options import require_number, require_used
from .training.regression import ForwardOptions, ForwardProcessAlgorithm

_BEHAVIOUR_FOLDER = "behaviour"


def negative_aware_loss(
    pred_x0: Tensor, old_pred_x0: Tensor, clean: Tensor, optimality: Tensor, *, beta: float
) -> Tensor:
    """Return [r·ℓ(x̂⁺) + (1 − r)·ℓ(x̂⁻)]/β of each sample, [B].

        x̂⁺ = β·x̂_θ + (1 − β)·x̂_old    x̂⁻ = (1 + β)·x̂_old − β·x̂_θ    ℓ(x̂) = mean (x̂ − x_0)² / sg(mean |x̂ − x_0|)

    Good samples pull the prediction toward them, bad ones push the implicit negative prediction toward them. The
    published code mixes velocities; at one (x_t, t) they are linear in x̂_0, so this is the same.

    Source: Zheng et al., 2025, eq. 9 and section 3.3, https://arxiv.org/abs/2509.16117.

    Args:
        pred_x0: [B, ...] x̂_θ, with gradients.
        old_pred_x0: [B, ...] x̂_old of the policy that drew the samples.
        clean: [B, ...] x_0.
        optimality: [B] r in [0, 1]: how good the samples are.
        beta: How far the implicit policies are apart.
    """

    def distance(implicit: Tensor) -> Tensor:
        away = (implicit - clean).flatten(1)
        return away.square().mean(1) / away.detach().abs().mean(1).clamp(min=1e-5)

    positive = distance(beta * pred_x0 + (1 - beta) * old_pred_x0)
    negative = distance((1 + beta) * old_pred_x0 - beta * pred_x0)
    return (optimality * positive + (1 - optimality) * negative) / beta


@final
class DiffusionNFT(ForwardProcessAlgorithm):
    """Negative-aware fine-tuning: contrasts better and worse samples on the forward process.

        r_i = clip(A_i/(2·advantage_clip) + ½, 0, 1)
        L = advantage_clip·mean_i [r_i·ℓ(x̂⁺) + (1 − r_i)·ℓ(x̂⁻)]/β + kl_coefficient·mean_i ‖v̂_θ − v̂_ref‖²/D

    at one random t and ε for each sample and pass (see `negative_aware_loss`). Samples are drawn by an older copy of
    the policy that follows it: old ← η·old + (1 − η)·θ after every rollout, η = min(0.001·iteration, max_decay). They
    may be drawn by any sampler, a deterministic one (`eta=0`) too.

    Source: Zheng et al., 2025, https://arxiv.org/abs/2509.16117; NVlabs/DiffusionNFT train_nft_sd3.py. The pull to the
    reference is in the code alone; without it runs are reported to collapse.

    Note:
        What is published trains and samples without guidance, `DenoisingPolicy(model, guidance_scale=1)`; with another
        scale it is the guided prediction that is contrasted. It has groups of 24 (here 4 unless told otherwise, so that
        a few lanes will do), noises each sample as often as the sampler has steps (`noise_draws`), and evaluates an
        average of the weights (`ema_decay=0.9`).

    Args are those of `ForwardProcessAlgorithm` (learning_rate=3e-4, as published), and:
        policy: A `DenoisingPolicy`.
        env: A vector environment whose action is the next latents.
        n_epochs: Passes over a rollout, each with fresh noise.
        beta: β.
        group_size: Images of a prompt side by side (4; published: 24).
        advantage_clip: Advantages beyond ± this count as this. They are the rewards less the mean of their prompt's in
            the rollout, divided by the standard deviation of all, as published (`grouped_by_prompt`).
        kl_coefficient: The weight of the pull to the untrained policy, `policy.reference()` (published: 1e-4); 0: none.
        max_decay: The largest η.
        per_prompt_buffer_size: Remember so many rewards per prompt, and compare with these, as DDPO does (see
            `PerPromptStats`); None: as published.
        per_prompt_min_count: Rewards from which on a prompt is then compared to itself.

    Raises:
        TypeError, ValueError: as `Algorithm`; or the policy is no `DenoisingPolicy`, or the environment's action is not
            the next latents.
    """

    def __init__(
        self,
        policy: Policy,
        env: VectorEnv,
        *,
        n_epochs: int = 1,
        beta: float = 1.0,
        advantage_clip: float = 5.0,
        kl_coefficient: float = 1e-4,
        max_decay: float = 0.5,
        per_prompt_buffer_size: int | None = None,
        per_prompt_min_count: int = 4,
        **options: Unpack[ForwardOptions],
    ) -> None:
        own = {
            "n_epochs": n_epochs,
            "beta": beta,
            "advantage_clip": advantage_clip,
            "kl_coefficient": kl_coefficient,
            "max_decay": max_decay,
            "per_prompt_buffer_size": per_prompt_buffer_size,
            "per_prompt_min_count": per_prompt_min_count,
        }
        options.setdefault("learning_rate", 3e-4)
        options.setdefault("group_size", 4)
        super().__init__(policy, env, n_epochs=n_epochs, own=own, **options)
        require_number("(0, inf)", beta=beta, advantage_clip=advantage_clip)
        require_number("[0, inf)", kl_coefficient=kl_coefficient)
        require_number("[0, 1)", max_decay=max_decay)
        has_statistics = per_prompt_buffer_size is not None
        require_used("per_prompt_buffer_size", has_statistics, per_prompt_min_count=(per_prompt_min_count, 4))
        self.beta = beta
        self.advantage_clip = advantage_clip
        self.kl_coefficient = kl_coefficient
        self.max_decay = max_decay
        self.per_prompt_stats = (
            None if per_prompt_buffer_size is None else PerPromptStats(per_prompt_buffer_size, per_prompt_min_count)
        )
        self._reference = self.policy.reference() if kl_coefficient else None
        shared = [self.policy.model, *(parameter for parameter in policy.parameters() if not parameter.requires_grad)]
        self._behaviour = copy.deepcopy(self.policy, memo={id(one): one for one in shared}).requires_grad_(False)

    @property
    def behaviour(self) -> DenoisingPolicy:
        """The older copy of the policy that draws the samples."""
        return self._behaviour

    def train(self, rollout: Rollout) -> Metrics:
        """Update the policy from one rollout's images, and let the policy that draws follow it."""
        replay = Replay.from_rollout(rollout)
        optimality = self.optimality(replay)
        rng = self._update_generator()
        rows = np.arange(len(replay))
        metrics = mean_of(self._update(replay, optimality, batch, rng) for batch in self._batches(rows, rng))
        self._follow()
        return metrics

    def optimality(self, replay: Replay) -> Tensor:
        """Return how good each sample is beside those of its prompt, r in [0, 1], [N]."""
        if self.per_prompt_stats is None:
            warn_of_lonely(replay.prompts, "nothing is learnt from it")
            advantages = grouped_by_prompt(replay.rewards, replay.prompts)
        else:
            texts = texts_of(replay.prompts, self.env.unwrapped.prompts)  # type: ignore[attr-defined]
            remembered = self.per_prompt_stats.update(texts, replay.rewards.tolist())
            advantages = torch.from_numpy(remembered).to(replay.rewards.device)
        return (advantages / (2 * self.advantage_clip) + 0.5).clamp(0, 1)

    def _update(
        self, replay: Replay, optimality: Tensor, rows: np.ndarray, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Make one optimizer step from some of the samples, each at a time and with a noise of its own."""
        names = ("loss",) if self._reference is None else ("loss", "kl")
        totals = {name: torch.zeros((), device=self.policy.device) for name in names}
        for index, inputs in self._noised(replay, rows, rng):
            clean, t, _, _ = inputs
            with torch.no_grad():
                old = self._behaviour.predict_noised(*inputs).x0
            x0 = self.policy.predict_noised(*inputs).x0
            loss = negative_aware_loss(x0, old, clean, optimality[index], beta=self.beta)
            total = self.advantage_clip * loss.sum() / len(rows)
            if self._reference is not None:
                with torch.no_grad():
                    reference = self._reference.predict_noised(*inputs).x0
                # ‖v̂ − v̂_ref‖ = ‖x̂_0 − x̂_0,ref‖/σ, on variance-preserving processes and on flows.
                away = (x0 - reference) / broadcast_to(self.policy.model.schedule.sigma(t), x0)
                kl = away.square().flatten(1).mean(1).sum() / len(rows)
                totals["kl"] += kl.detach()
                total = total + self.kl_coefficient * kl
            self.backward(total)
            totals["loss"] += total.detach()
        return self.processes.sums(totals) | {"grad_norm": self.optimizer_step()}

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(0.001 * self.iteration, self.max_decay)
        for old, new in zip(self._behaviour.parameters(), self.policy.parameters(), strict=True):
            old.lerp_(new, 1 - decay)

    # ------------------------------------------------------------------ files
    def _extra_state(self) -> dict[str, object]:
        return {} if self.per_prompt_stats is None else {"per_prompt_stats": self.per_prompt_stats.state_dict()}

    def _load_extra_state(self, state: dict[str, dict[str, list[float]]]) -> None:
        if self.per_prompt_stats is not None:
            self.per_prompt_stats.load_state_dict(state["per_prompt_stats"])

    def _save_files(self, folder: Path) -> None:
        self._behaviour.save(folder / _BEHAVIOUR_FOLDER)

    def _load_files(self, folder: Path) -> None:
        self._behaviour.load_weights(folder / _BEHAVIOUR_FOLDER)
