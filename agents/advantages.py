"""From rewards to advantages."""

import warnings
from collections import Counter, deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

GroupBaseline = Literal["leave_one_out", "group_mean"]
AdvantageScale = Literal["none", "rollout", "global", "group"]

ROUNDING = 16 * torch.finfo(torch.float32).eps


def deviations(rewards: Tensor) -> Tensor:
    """Return r − mean over the last dimension, of the rewards' shape; 0 where they differ by their rounding alone.

    That is by no more than 16 units in the last place of float32, 2e-6 of the largest: equal images may be rewarded
    so differently by a GPU, or in another batch, and a division by the standard deviation would make it a signal.
    """
    away = rewards - rewards[..., :1]  # the mean of equal numbers may else differ from them, by rounding
    spread = away.amax(-1, keepdim=True) - away.amin(-1, keepdim=True)
    equal = spread <= ROUNDING * rewards.abs().amax(-1, keepdim=True)
    return (away - away.mean(-1, keepdim=True)).masked_fill(equal, 0)


def normalise(rewards: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """Return (r − mean) / (std + ε) over the batch, [B]; on the rewards' device, without waiting for it.

    Source: ddpo-pytorch (population standard deviation).

    Note:
        Rewards that differ by rounding alone have advantages of 0, see `deviations`; so everywhere here.
    """
    away = deviations(rewards)
    return away / (away.std(correction=0) + epsilon)


def group_advantages(
    rewards: Tensor, *, baseline: GroupBaseline = "leave_one_out", scale: AdvantageScale = "none"
) -> Tensor:
    """Return how much better each sample is than its group, [P, K]; every group's advantages sum to 0.

        "leave_one_out": A_ik = r_ik − mean of the group's other rewards (RLOO: the policy gradient, unbiased)
        "group_mean":    A_ik = r_ik − mean of the group (GRPO: (K − 1)/K of the above)

    divided by nothing ("none"), by the standard deviation of all advantages ("rollout"), by that of all rewards
    ("global": Flow-GRPO's code), or by that of the group's rewards ("group": GRPO), which weighs every group alike, the
    ones whose rewards hardly differ too.

    Source: Ahmadian et al., 2024, "Back to Basics", eq. 8, https://arxiv.org/abs/2402.14740; Shao et al., 2024
    (GRPO), section 4.1, https://arxiv.org/abs/2402.03300; Liu et al., 2025 (Flow-GRPO),
    https://arxiv.org/abs/2505.05470.

    Note:
        Flow-GRPO adds 1e-4 to the standard deviation. Here it is 1e-4 of that over all groups, so that a reward's unit
        does not matter, and a group of equal rewards has advantages of 0.

    Args:
        rewards: [P, K] of K ≥ 2 samples of each of P prompts. One that is NaN is compared with nothing: its advantage
            is 0, and the others' are those of a smaller group.
        baseline: What a sample is compared with.
        scale: What the difference is divided by.

    Raises:
        ValueError: there are no groups of at least 2.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"group_advantages needs rewards [P, K] with K of at least 2, got {list(rewards.shape)}")
    there = ~rewards.isnan()
    size, total = there.sum(1, keepdim=True).clamp(min=1), there.sum()
    rewards = torch.where(there, rewards, rewards.nanmean(1, keepdim=True).nan_to_num())  # of deviation 0
    away = deviations(rewards)
    advantages = away
    if baseline == "leave_one_out":
        advantages = advantages * (size / (size - 1).clamp(min=1))
    if scale == "none":
        return advantages
    overall = (advantages.square().sum() / total).sqrt()
    if scale == "rollout":
        return advantages / (overall + 1e-8)
    if scale == "global":
        return advantages / (rewards[there].std(correction=0) + 1e-8)
    return advantages / ((away.square().sum(1, keepdim=True) / size).sqrt() + 1e-4 * overall + 1e-12)


def grouped_by_prompt(rewards: Tensor, prompts: np.ndarray) -> Tensor:
    """Return (r − mean of its prompt's) / (std of all + ε) of a rollout's rewards, [B].

    Source: Zheng et al., 2025 (DiffusionNFT), train_nft_sd3.py, https://arxiv.org/abs/2509.16117.

    Args:
        rewards: [B].
        prompts: [B] on the host: equal numbers are equal prompts. One that is there once has an advantage of 0.
    """
    advantages = torch.zeros_like(rewards)
    for prompt in np.unique(prompts):
        mine = torch.from_numpy(np.flatnonzero(prompts == prompt)).to(rewards.device)
        advantages[mine] = deviations(rewards[mine])
    return advantages / (rewards.std(correction=0) + 1e-4)


def warn_of_lonely(prompts: np.ndarray, consequence: str) -> None:
    """Warn if a prompt is in a rollout once, where samples are compared with those of their prompt alone."""
    if 1 in Counter(prompts.tolist()).values():
        warnings.warn(
            f"some prompts have one image in a rollout, which nothing is compared with: {consequence}. Give a "
            "group_size of at least 2, or more samples_per_epoch",
            stacklevel=3,
        )


class PerPromptStats:
    """Rewards relative to what the same prompt earned lately.

    A_i = (r_i − mean_p) / (std_p + 1e-6) over the last `buffer_size` rewards of its prompt p, the new ones included;
    over the whole batch for a prompt with fewer than `min_count` of them.

    Source: Black et al., 2023, section 4.3 and appendix D, https://arxiv.org/abs/2305.13301; ddpo-pytorch
    stat_tracking.py.

    Note:
        Prompts are told apart by their texts, as in the published codes, where two that are equal after truncation
        become one. Prompts outside of the environment's set (None) are always compared to the whole batch. The
        statistics are part of a checkpoint.

    Args:
        buffer_size: Rewards remembered per prompt.
        min_count: Rewards from which on a prompt is compared to itself.
    """

    def __init__(self, buffer_size: int = 16, min_count: int = 16) -> None:
        if not 1 <= min_count <= buffer_size:
            raise ValueError(
                f"min_count must be between 1 and buffer_size ({buffer_size}), got {min_count}; algorithms call them "
                "per_prompt_min_count and per_prompt_buffer_size: give both"
            )
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._rewards: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str | None], rewards: Sequence[float]) -> np.ndarray:
        """Remember a batch of rewards and return its advantages, [B] float32."""
        values = np.asarray(rewards, dtype=np.float64)
        advantages = np.zeros_like(values)
        for prompt in dict.fromkeys(prompts):
            mine = np.array([other == prompt for other in prompts])
            base = values
            if prompt is not None:
                known = self._rewards.setdefault(prompt, deque(maxlen=self.buffer_size))
                known.extend(values[mine].tolist())
                base = values if len(known) < self.min_count else np.array(known)
            if np.ptp(base) > ROUNDING * np.abs(base).max():
                advantages[mine] = (values[mine] - base.mean()) / (base.std() + 1e-6)
        return advantages.astype(np.float32)

    def state_dict(self) -> dict[str, list[float]]:
        """Return what is remembered, as JSON can hold it."""
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Remember what `state_dict` returned."""
        self._rewards = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in state.items()}


def texts_of(prompt_ids: np.ndarray, prompts: Sequence[str]) -> list[str | None]:
    """Return the texts of prompts, as `PerPromptStats.update` takes them; None for those outside the set."""
    return [None if index < 0 else prompts[index] for index in prompt_ids.tolist()]


def clip_advantages(advantages: Tensor, clip: float | None) -> Tensor:
    """Return the advantages within ±clip; as they are for None."""
    return advantages if clip is None else torch.clamp(advantages, -clip, clip)
