"""From rewards to advantages: the parts that algorithms are given, and the functions behind them."""

import warnings
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final, get_args

import numpy as np
import torch
from gymnasium.spaces import Space
from torch import Tensor

from diffusion_gym import transfer
from diffusion_gym.checks import checked_integer, checked_number
from diffusion_gym.parts import Part

from .policies.base import Observation

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
            "group_size of at least 2, or more samples, rollouts=Rollouts(…)",
            stacklevel=3,
        )


class Memory(Protocol):
    """What advantages remember from one rollout to the next; it is part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered beside tensors, as JSON can hold it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what `state_dict` returned."""

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the tensors that are remembered, by name."""

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what `tensors` returned."""


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
        buffer_size = checked_integer("buffer_size", buffer_size, at_least=1)
        min_count = checked_integer("min_count", min_count, at_least=1)
        if not 1 <= min_count <= buffer_size:
            raise ValueError(f"min_count must be between 1 and buffer_size ({buffer_size}), got {min_count}")
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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what `state_dict` returned."""
        self._rewards = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in state.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return none."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` returned: nothing."""


def clip_advantages(advantages: Tensor, clip: float | None) -> Tensor:
    """Return the advantages within ±clip; as they are for None."""
    return advantages if clip is None else torch.clamp(advantages, -clip, clip)


class Episodes(Protocol):
    """What was seen in a rollout's episodes: `Rollout`, for parts that look at states."""

    @property
    def scored(self) -> np.ndarray:
        """The actions that are learnt from, [T, B] bool on the host."""

    def observation(self, steps: Tensor, lanes: Tensor) -> Observation:
        """Return what was observed at M steps of episodes, [M, …] each, given their indices [M] on the device."""

    def micro_batches(self, steps: np.ndarray, lanes: np.ndarray, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield indices on the device, `size` at a time."""


@dataclass(frozen=True, eq=False)
class Rewards:
    """The rewards of a rollout's B episodes, and what they are compared by.

    Args:
        values: [B] float32; NaN where an episode has no valid reward.
        valid: [B] bool on the host.
        prompt_id: [B] int64 on the host; −1 is a prompt outside of the environment's set.
        texts: The environment's prompts.
        group_size: So many episodes side by side have one prompt.
        episodes: What was seen in the episodes; None: it is not known, as of finished images.
    """

    values: Tensor
    valid: np.ndarray
    prompt_id: np.ndarray
    texts: Sequence[str]
    group_size: int
    episodes: Episodes | None = None

    def prompts(self) -> list[str | None]:
        """Return the prompts' texts; None for those outside of the set."""
        return [None if index < 0 else self.texts[index] for index in self.prompt_id.tolist()]


class Advantages(Part, ABC):
    """How good each episode of a rollout is beside others."""

    def memory(self, observation_space: Space, device: torch.device) -> Memory | None:
        """Return a new memory, for `estimate`; None: it needs none.

        Args:
            observation_space: The space of one lane.
            device: The device of rewards and observations.
        """
        return None

    def check(self, group_size: int) -> None:
        """Raise ValueError if it cannot compare episodes in groups of this size."""

    @final
    def of(self, rewards: Rewards, memory: Memory | None = None) -> Tensor:
        """Return the advantage of each episode, [B]: 0 where there is no valid reward; the others' are without it.

        Of each action, [T, B], where it `looks_at_states`.
        """
        if rewards.valid.all() or self.compares_groups or self.looks_at_states:
            return self.estimate(rewards, memory)
        rows = np.flatnonzero(rewards.valid)
        kept = torch.from_numpy(rows).to(rewards.values.device)
        valid = Rewards(
            rewards.values[kept], rewards.valid[rows], rewards.prompt_id[rows], rewards.texts, rewards.group_size
        )
        advantages = self.estimate(valid, memory)
        return advantages.new_zeros(len(rewards.values)).index_copy(0, kept, advantages)

    @property
    def compares_groups(self) -> bool:
        """Whether it needs whole groups, those without a valid reward too."""
        return False

    @property
    def looks_at_states(self) -> bool:
        """Whether it looks at what was seen in the episodes, those without a valid reward too."""
        return False

    @abstractmethod
    def estimate(self, rewards: Rewards, memory: Memory | None) -> Tensor:
        """Return the advantage of each episode, [B], or of each action, [T, B], where it `looks_at_states`.

        All rewards are valid unless it `compares_groups` or `looks_at_states`.
        """


def check_clip(clip: float | None) -> None:
    """Raise ValueError if a clip is neither None nor a positive number."""
    if clip is not None:
        checked_number("clip", clip, "(0, inf)")


@final
@dataclass(frozen=True)
class PerPrompt(Advantages):
    """Rewards relative to what the same prompt earned lately, see `PerPromptStats`.

    Source: Black et al., 2023, section 4.3 and appendix D, https://arxiv.org/abs/2305.13301.

    Args:
        buffer_size: Rewards remembered per prompt (ddpo-pytorch: 16, for aesthetics and alignment 32).
        min_count: Rewards from which on a prompt is compared to itself; None: `buffer_size`.
        clip: Advantages are clamped to ±this; None: not at all. The paper does not say; ddpo-pytorch has 5, the
            authors' JAX code 10.
        center: Subtract the rollout's mean advantage. Statistics over past rollouts lag behind a reward that moves; the
            common offset that this leaves adds variance and nothing else. No published code does it.

    Raises:
        TypeError, ValueError: a number is out of its range.
    """

    buffer_size: int = 16
    min_count: int | None = None
    clip: float | None = 5.0
    center: bool = False

    def __post_init__(self) -> None:
        self._new_memory()
        check_clip(self.clip)

    def memory(self, observation_space: Space, device: torch.device) -> PerPromptStats:
        """Return an empty memory of prompts' rewards."""
        return self._new_memory()

    def _new_memory(self) -> PerPromptStats:
        return PerPromptStats(self.buffer_size, self.buffer_size if self.min_count is None else self.min_count)

    def estimate(self, rewards: Rewards, memory: Memory | None) -> Tensor:
        """Return the advantages, [B]; the memory then knows these rewards too."""
        assert isinstance(memory, PerPromptStats)
        advantages = memory.update(rewards.prompts(), transfer.to_host(rewards.values).tolist())
        if self.center:
            advantages -= advantages.mean()
        return clip_advantages(torch.from_numpy(advantages).to(rewards.values.device), self.clip)


@final
@dataclass(frozen=True)
class Batch(Advantages):
    """Rewards relative to those of the whole rollout: (r − mean)/std.

    Args:
        clip: Advantages are clamped to ±this; None: not at all.
    """

    clip: float | None = 5.0

    def __post_init__(self) -> None:
        check_clip(self.clip)

    def estimate(self, rewards: Rewards, memory: Memory | None) -> Tensor:
        """Return the advantages, [B]."""
        return clip_advantages(normalise(rewards.values), self.clip)


@final
@dataclass(frozen=True)
class Groups(Advantages):
    """Rewards relative to those of the group, the episodes of one prompt side by side: see `group_advantages`.

    Args:
        baseline: What an episode is compared with: "leave_one_out" (RLOO) or "group_mean" (GRPO).
        scale: What the difference is divided by: "none" (the published RLOO codes; Adam makes up for most of a reward's
            scale), the standard deviation of all advantages of the "rollout", of all its rewards ("global": Flow-GRPO's
            code), or of each "group" (GRPO).
        clip: Advantages are clamped to ±this (Flow-GRPO: 5); None: not at all.

    Raises:
        TypeError, ValueError: a value is none of those, or has no effect.
    """

    baseline: GroupBaseline = "leave_one_out"
    scale: AdvantageScale = "none"
    clip: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (("baseline", GroupBaseline), ("scale", AdvantageScale)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {get_args(kind)}, got {getattr(self, name)!r}")
        if self.scale == "rollout" and self.baseline != "leave_one_out":
            raise ValueError(
                f'baseline={self.baseline!r} has no effect with scale="rollout", which divides out the factor by which '
                "baselines differ: give another scale, or leave the baseline out"
            )
        check_clip(self.clip)

    @property
    def compares_groups(self) -> bool:
        """Whole groups: an episode without a valid reward is left out of its own."""
        return True

    def check(self, group_size: int) -> None:
        """Raise ValueError if the groups are of one."""
        if group_size < 2:
            raise ValueError(
                "advantages=Groups(…) compares the episodes of a prompt: group_size must be at least 2, got "
                f"{group_size}; give rollouts=Rollouts(group_size=4)"
            )

    def estimate(self, rewards: Rewards, memory: Memory | None) -> Tensor:
        """Return the advantages, [B]."""
        groups = rewards.values.reshape(-1, rewards.group_size)
        advantages = group_advantages(groups, baseline=self.baseline, scale=self.scale).flatten()
        return clip_advantages(advantages, self.clip)


@final
@dataclass(frozen=True)
class PromptMeans(Advantages):
    """Rewards less the mean of their prompt's in the rollout, over the standard deviation of all (DiffusionNFT).

    Source: Zheng et al., 2025 (DiffusionNFT), train_nft_sd3.py, https://arxiv.org/abs/2509.16117.

    Args:
        clip: Advantages are clamped to ±this.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        check_clip(self.clip)

    def estimate(self, rewards: Rewards, memory: Memory | None) -> Tensor:
        """Return the advantages, [B]."""
        warn_of_lonely(rewards.prompt_id, "nothing is learnt from it")
        return clip_advantages(grouped_by_prompt(rewards.values, rewards.prompt_id), self.clip)
