"""DiffusionNFT: reinforcement learning on the forward process, without likelihoods, trajectories or a fixed sampler.

Source: Zheng et al., 2025, "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
https://arxiv.org/abs/2509.16117; NVlabs/DiffusionNFT.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from diffusion_gym.checks import checked_number
from diffusion_gym.predictions import broadcast_to

from .advantages import Advantages, PromptMeans, Rewards
from .experience.replay import Replay
from .experience.rollouts import Rollout, Rollouts
from .logs.diagnostics import Metrics
from .policies import DenoisingPolicy, Policy
from .training.algorithm import LearningRate
from .training.regression import Noised, Regression

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
@dataclass(kw_only=True, eq=False, repr=False)
class DiffusionNFT(Regression):
    """Negative-aware fine-tuning: contrasts better and worse samples on the forward process.

        r_i = clip(A_i/(2·advantage_clip) + ½, 0, 1)
        L = advantage_clip·mean_i [r_i·ℓ(x̂⁺) + (1 − r_i)·ℓ(x̂⁻)]/β + kl_coefficient·mean_i ‖v̂_θ − v̂_ref‖²/D

    at one random t and ε for each sample and pass (see `negative_aware_loss`). Samples are drawn by an older copy of
    the policy that follows it: old ← η·old + (1 − η)·θ after every rollout, η = min(0.001·iteration, max_decay). They
    may be drawn by any sampler, a deterministic one (`DDIM(eta=0)`) too.

    Source: Zheng et al., 2025, https://arxiv.org/abs/2509.16117; NVlabs/DiffusionNFT train_nft_sd3.py. The pull to the
    reference is in the code alone; without it runs are reported to collapse.

    Note:
        What is published trains and samples without guidance, `DenoisingPolicy(model, guidance_scale=1)`; with another
        scale it is the guided prediction that is contrasted. It has groups of 24 (here 4, so that a few lanes will do),
        noises each sample as often as the sampler has steps (`Noising(draws=…)`), and evaluates an average of the
        weights (`ema_decay=0.9`).

    Args:
        learning_rate: As published.
        rollouts: Published: groups of 24.
        advantages: How good each sample is beside those of its prompt: as published, or `PerPrompt(…)`, as DDPO's.
        beta: β: how far the implicit policies are apart.
        advantage_clip: Advantages beyond ± this count as this.
        kl_coefficient: The weight of the pull to the untrained policy, `policy.reference()` (published: 1e-4); 0: none.
        max_decay: The largest η.
    """

    learning_rate: LearningRate = 3e-4
    rollouts: Rollouts = Rollouts(group_size=4)
    advantages: Advantages = PromptMeans()
    beta: float = 1.0
    advantage_clip: float = 5.0
    kl_coefficient: float = 1e-4
    max_decay: float = 0.5

    def __post_init__(self) -> None:
        for name in ("beta", "advantage_clip"):
            checked_number(name, getattr(self, name), "(0, inf)")
        checked_number("kl_coefficient", self.kl_coefficient, "[0, inf)")
        checked_number("max_decay", self.max_decay, "[0, 1)")
        super().__post_init__()
        advantages = self.advantages
        if not isinstance(advantages, Advantages) or advantages.compares_groups or advantages.looks_at_states:
            raise TypeError(
                f"advantages must compare samples by their prompts, PromptMeans() or PerPrompt(16); got {advantages!r}"
            )
        self._memory = advantages.memory(self.env.single_observation_space, self.base_env.device)
        self._reference = self.policy.reference() if self.kl_coefficient else None
        frozen = [parameter for parameter in self.policy.parameters() if not parameter.requires_grad]
        shared = {id(value): value for value in (self.policy.model, *frozen)}
        self._behaviour = copy.deepcopy(self.policy, memo=shared).requires_grad_(False)

    @property
    def behaviour(self) -> DenoisingPolicy:
        """The older copy of the policy that draws the samples."""
        return self._behaviour

    def train(self, rollout: Rollout) -> Metrics:
        """Update the policy from one rollout's images, and let the policy that draws follow it."""
        metrics = super().train(rollout)
        self._follow()
        return metrics

    def weights_of(self, replay: Replay) -> Tensor:
        """Return how good each sample is beside those of its prompt, r in [0, 1], [N]."""
        valid = np.ones(len(replay), dtype=bool)
        texts = self.base_env.prompts.texts
        rewards = Rewards(replay.rewards, valid, replay.prompts, texts, self.sizes.group)
        advantages = self.advantages.of(rewards, self._memory)
        return (advantages / (2 * self.advantage_clip) + 0.5).clamp(0, 1)

    @property
    def logged(self) -> tuple[str, ...]:
        """The loss, and the distance to the untrained policy."""
        return ("loss",) if self._reference is None else ("loss", "kl")

    def losses_of(self, noised: Noised, weights: Tensor) -> dict[str, Tensor]:
        """Return the loss of each sample, and its squared distance to the untrained policy."""
        with torch.no_grad():
            old = noised.predicted_by(self._behaviour).x0
        x0 = noised.predicted_by(self.policy).x0
        loss = self.advantage_clip * negative_aware_loss(x0, old, noised.clean, weights, beta=self.beta)
        if self._reference is None:
            return {"loss": loss}
        with torch.no_grad():
            reference = noised.predicted_by(self._reference).x0
        # ‖v̂ − v̂_ref‖ = ‖x̂_0 − x̂_0,ref‖/σ, on variance-preserving processes and on flows.
        away = (x0 - reference) / broadcast_to(self.policy.model.schedule.sigma(noised.t), x0)
        kl = away.square().flatten(1).mean(1)
        return {"loss": loss + self.kl_coefficient * kl, "kl": kl}

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(0.001 * self.iteration, self.max_decay)
        for old, new in zip(self._behaviour.parameters(), self.policy.parameters(), strict=True):
            if new.requires_grad:  # the others are the model's own: both policies share them
                old.lerp_(new, 1 - decay)

    def state(self) -> dict[str, Any]:
        """Return the memory of rewards."""
        return {} if self._memory is None else {"advantages": self._memory.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        if self._memory is not None:
            self._memory.load_state_dict(state["advantages"])

    def saved_policies(self) -> Mapping[str, Policy]:
        """Return the policy that draws."""
        return {_BEHAVIOUR_FOLDER: self._behaviour}
