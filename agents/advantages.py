"""From rewards to advantages."""

from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

GroupBaseline = Literal["leave_one_out", "group_mean"]
AdvantageScale = Literal["none", "rollout", "group"]


def normalise(rewards: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """Return (r − mean) / (std + ε) over the batch, [B]; on the rewards' device, without waiting for it.

    Source: ddpo-pytorch (population standard deviation).
    """
    rewards = rewards - rewards[:1]  # the mean of equal numbers may else differ from them, by rounding
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + epsilon)


def group_advantages(
    rewards: Tensor, *, baseline: GroupBaseline = "leave_one_out", scale: AdvantageScale = "none"
) -> Tensor:
    """Return how much better each sample is than its group, [P, K]; every group's advantages sum to 0.

        "leave_one_out": A_ik = r_ik − mean of the group's other rewards (RLOO: the policy gradient, unbiased)
        "group_mean":    A_ik = r_ik − mean of the group (GRPO: (K − 1)/K of the above)

    divided by nothing ("none"), by the standard deviation of all advantages ("rollout"), or by that of the group's
    rewards ("group": GRPO), which weighs every group alike, the ones whose rewards hardly differ too.

    Source: Ahmadian et al., 2024, "Back to Basics", eq. 8, https://arxiv.org/abs/2402.14740; Shao et al., 2024
    (GRPO), section 4.1, https://arxiv.org/abs/2402.03300; Liu et al., 2025 (Flow-GRPO),
    https://arxiv.org/abs/2505.05470.

    Note:
        Flow-GRPO adds 1e-4 to the group's standard deviation. Here it is 1e-4 of that over all groups, so that a
        reward's unit does not matter, and a group of equal rewards has advantages of 0.

    Args:
        rewards: [P, K] of K ≥ 2 samples of each of P prompts.
        baseline: What a sample is compared with.
        scale: What the difference is divided by.

    Raises:
        ValueError: there are no groups of at least 2.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"group_advantages needs rewards [P, K] with K of at least 2, got {list(rewards.shape)}")
    size = rewards.shape[1]
    rewards = rewards - rewards[:, :1]  # see `normalise`
    advantages = rewards - rewards.mean(1, keepdim=True)
    if baseline == "leave_one_out":
        advantages = advantages * (size / (size - 1))
    if scale == "none":
        return advantages
    overall = advantages.std(correction=0)
    if scale == "rollout":
        return advantages / (overall + 1e-8)
    return advantages / (rewards.std(1, correction=0, keepdim=True) + 1e-4 * overall + 1e-12)


class PerPromptStats:
    """Rewards relative to what the same prompt earned lately.

    A_i = (r_i − mean_p) / (std_p + 1e-6) over the last `buffer_size` rewards of its prompt p, the new ones included;
    over the whole batch for a prompt with fewer than `min_count` of them.

    Source: Black et al., 2023, section 4.3 and appendix D, https://arxiv.org/abs/2305.13301; ddpo-pytorch
    stat_tracking.py.

    Note:
        Prompts are told apart by their index in the prompt set, where the published codes use the detokenised text,
        in which two prompts that are equal after truncation become one. Prompts outside the set (index −1) are always
        compared to the whole batch. The statistics are part of a checkpoint.

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
        self._rewards: dict[int, deque[float]] = {}

    def update(self, prompt_ids: Sequence[int], rewards: Sequence[float]) -> np.ndarray:
        """Remember a batch of rewards and return its advantages, [B] float32."""
        ids, values = np.asarray(prompt_ids), np.asarray(rewards, dtype=np.float64)
        advantages = np.empty_like(values)
        for prompt_id in np.unique(ids):
            mine = ids == prompt_id
            known = self._rewards.setdefault(int(prompt_id), deque(maxlen=self.buffer_size))
            known.extend(values[mine])
            base = values if prompt_id < 0 or len(known) < self.min_count else np.array(known)
            advantages[mine] = (values[mine] - base.mean()) / (base.std() + 1e-6)
        return advantages.astype(np.float32)

    def state_dict(self) -> dict[str, list[float]]:
        """Return what is remembered, as JSON can hold it."""
        return {str(prompt_id): list(rewards) for prompt_id, rewards in self._rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Remember what `state_dict` returned."""
        self._rewards = {int(key): deque(rewards, maxlen=self.buffer_size) for key, rewards in state.items()}


def clip_advantages(advantages: Tensor, clip: float | None) -> Tensor:
    """Return the advantages within ±clip; as they are for None."""
    return advantages if clip is None else torch.clamp(advantages, -clip, clip)
