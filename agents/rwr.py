"""Reward-weighted regression (RWR): a diffusion model is fine-tuned on its own samples, the better ones more.

Source: Black et al., 2023, section 4.2, https://arxiv.org/abs/2305.13301; Lee et al., 2023 (RWR-sparse),
https://arxiv.org/abs/2302.12192; Peters & Schaal, 2007.
"""

from typing import final

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from typing_extensions import Unpack

from .advantages import normalise, warn_of_lonely
from .experience.replay import Replay
from .experience.rollouts import Rollout
from .logs.diagnostics import Metrics, effective_sample_size, mean_of
from .policies import Policy
from .training.options import require_number, require_used
from .training.regression import ForwardOptions, ForwardProcessAlgorithm


def softmax_weights(rewards: Tensor, *, inverse_temperature: float, groups: np.ndarray | None = None) -> Tensor:
    """Return w_i = n·softmax(β·r)_i, [N]: over all samples, or within each group of n.

    Source: Black et al., 2023, section 4.2, https://arxiv.org/abs/2305.13301; jannerm/ddpo.

    Args:
        rewards: [N].
        inverse_temperature: β.
        groups: [N] equal numbers belong together; None: all do.
    """
    if groups is None:
        return len(rewards) * torch.softmax(inverse_temperature * rewards, 0)
    weights = torch.empty_like(rewards)
    for group in np.unique(groups):
        mine = torch.from_numpy(groups == group).to(rewards.device)
        weights[mine] = softmax_weights(rewards[mine], inverse_temperature=inverse_temperature)
    return weights


def best_weights(rewards: Tensor, *, share: float, groups: np.ndarray | None = None) -> Tensor:
    """Return 1 for the best share of samples, at least one, and 0 for the rest, [N] (RWR-sparse).

    Of samples that are equally good, those that are kept lie evenly among the others.

    Args are those of `softmax_weights`, and:
        share: How many are kept, in (0, 1].
    """
    if groups is None:
        golden = (5**0.5 - 1) / 2  # the fractions of its multiples: any first few of them are spread over [0, 1)
        spread = (torch.arange(len(rewards), dtype=torch.float64) * golden).frac().argsort().to(rewards.device)
        best = spread[rewards[spread].argsort(descending=True, stable=True)]
        return torch.zeros_like(rewards).index_fill(0, best[: max(1, round(share * len(rewards)))], 1.0)
    weights = torch.empty_like(rewards)
    for group in np.unique(groups):
        mine = torch.from_numpy(groups == group).to(rewards.device)
        weights[mine] = best_weights(rewards[mine], share=share)
    return weights


@final
class RWR(ForwardProcessAlgorithm):
    """Reward-weighted regression, dense (softmax) or sparse (the best share of the samples).

        w_i = N·softmax(β·r)_i    L = mean_i w_i·‖ε − ε̂_θ(α_t·x_0 + σ_t·ε, t, c_i)‖²/D,  one random t and ε each

    It learns from (prompt, x_0, reward) alone: no trajectories and no log-probs, so also from images on disk, see
    `fit`. It is no policy gradient, but regression to the tilted distribution p(x_0|c)·exp(β·r(x_0)), round by round.

    Source: Black et al., 2023, section 4.2, https://arxiv.org/abs/2305.13301; jannerm/ddpo.

    Note:
        With raw rewards β means something else for every reward: β = 0.2 on an aesthetic score (standard deviation 0.4)
        leaves 99 % of the samples effective, which is plain fine-tuning, and on kilobytes of large JPEGs (30) two or
        three of 10,000. Hence `normalise_rewards`; the published code has raw rewards.

    Args are those of `ForwardProcessAlgorithm` (paper: a learning rate of 1e-5, 10,240 samples per rollout, batches of
    128), and:
        policy: A `DenoisingPolicy`.
        env: A vector environment whose action is the next latents.
        n_epochs: Passes over a rollout, each with fresh noise (paper: 5; sparse 50).
        inverse_temperature: β (published: 0.2, on raw rewards).
        normalise_rewards: Subtract the rollout's mean reward and divide by its standard deviation first.
        per_prompt: Weigh the samples of each prompt against each other alone, as the paper writes; the published code
            does so for the aesthetic reward only. Needs several samples of each prompt in a rollout: one that is alone
            has a weight of 1, and there is a warning.
        best_share: Keep this share of the samples, unweighted (RWR-sparse; published: 0.1); None: softmax weights. It
            has no use for `inverse_temperature` and `normalise_rewards`, which are refused beside it.

    Raises:
        TypeError, ValueError: as `Algorithm`; or the policy is no `DenoisingPolicy`, or the environment's action is not
            the next latents.
    """

    def __init__(
        self,
        policy: Policy,
        env: VectorEnv,
        *,
        n_epochs: int = 5,
        inverse_temperature: float = 1.0,
        normalise_rewards: bool = True,
        per_prompt: bool = False,
        best_share: float | None = None,
        **options: Unpack[ForwardOptions],
    ) -> None:
        own = {
            "n_epochs": n_epochs,
            "inverse_temperature": inverse_temperature,
            "normalise_rewards": normalise_rewards,
            "per_prompt": per_prompt,
            "best_share": best_share,
        }
        super().__init__(policy, env, n_epochs=n_epochs, own=own, **options)
        require_number("(0, inf)", inverse_temperature=inverse_temperature)
        require_number("(0, 1]", none=True, best_share=best_share)
        require_used(
            "softmax weights, best_share=None",
            best_share is None,
            inverse_temperature=(inverse_temperature, 1.0),
            normalise_rewards=(normalise_rewards, True),
        )
        self.inverse_temperature = inverse_temperature
        self.normalise_rewards = normalise_rewards
        self.per_prompt = per_prompt
        self.best_share = best_share

    def weights(self, replay: Replay) -> Tensor:
        """Return the samples' weights, [N]."""
        groups = replay.prompts if self.per_prompt else None
        rewards = replay.rewards
        if groups is not None:
            warn_of_lonely(groups, "its weight is 1, whatever its reward")
        if self.best_share is not None:
            return best_weights(rewards, share=self.best_share, groups=groups)
        if self.normalise_rewards:
            rewards = normalise(rewards, epsilon=1e-8)
        return softmax_weights(rewards, inverse_temperature=self.inverse_temperature, groups=groups)

    def train(self, rollout: Rollout) -> Metrics:
        """Update the policy from one rollout's images."""
        return self.fit(Replay.from_rollout(rollout))

    def fit(self, replay: Replay) -> Metrics:
        """Update the policy from finished images: `n_epochs` passes, one update per `batch_size` of those that count.

        Called by `learn` with a rollout's images; call it with `Replay.from_folder` to learn from a folder. Of many
        processes each is to be given the whole folder, and learns from its share.

        Returns:
            Scalars: the loss, the gradient's norm, and the effective sample size.

        Raises:
            TypeError, ValueError: it is no replay, or one of another model, or a reward is not finite.
        """
        self._check_replay(replay)
        if len(replay.latents) == len(replay):
            replay = replay.share(self.processes.share(len(replay)))
        rng = self._update_generator(self.num_updates)  # a folder may be learnt from again and again
        weights = self.weights(replay)
        rows = np.flatnonzero(weights.cpu().numpy())
        means = mean_of(self._update(replay, weights, batch, rng) for batch in self._batches(rows, rng))
        return {**means, "effective_sample_size": effective_sample_size(weights)}

    def _check_replay(self, replay: Replay) -> None:
        if not isinstance(replay, Replay):
            raise TypeError(f"fit needs a Replay, such as Replay.from_folder(folder, policy.model); got {replay!r}")
        found, needed = tuple(replay.latents.shape[1:]), self.policy.model.latent_shape
        if found != needed:
            raise ValueError(f"the replay's latents must be the policy's, of shape {needed}; got {found}")
        if not bool(replay.rewards.isfinite().all()):
            row = int((~replay.rewards.isfinite()).nonzero()[0])
            raise ValueError(f"the replay's rewards must be finite, got {float(replay.rewards[row])} in row {row}")

    def _update(self, replay: Replay, weights: Tensor, rows: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """Make one optimizer step from some of the samples, each at a time and with a noise of its own."""
        total = torch.zeros((), device=self.policy.device)
        for index, inputs in self._noised(replay, rows, rng):
            _, _, noise, _ = inputs
            error = (self.policy.predict_noised(*inputs).epsilon - noise).square().flatten(1).mean(1)
            loss = (weights[index] * error).sum() / len(rows)
            self.backward(loss)
            total += loss.detach()
        return self.processes.sums({"loss": total}) | {"grad_norm": self.optimizer_step()}
