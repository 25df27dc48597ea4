"""Whole episodes of a vector environment, stored time-major, collected through the Gymnasium API alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from diffusion_gym.transitions import Reduction

from .policies.base import Generators, Observation, Policy

_CHANGING = ("latents", "timestep", "next_timestep")


@dataclass(frozen=True, eq=False)
class Rollout:
    """T steps of B episodes of one length.

    Latents are stored once, [T + 1, B, …]: what the policy saw and what it did are two views of one tensor. What does
    not change within an episode (the prompt, its embeddings) is stored once per episode.

    Args:
        latents: [T + 1, B, C, H, W] x_T … x_0.
        times: [T, B, 1] each: `timestep` and `next_timestep`.
        constants: [B, …] each: the rest of the observation.
        log_probs: [T, B] float32, by the policy that acted; 0 where `scored` is False.
        scored: [T, B] bool on the host: the action has a density.
        returns: [B] float32, the episodes' summed rewards.
        prompt_id: [B] int64 on the host.
        extras: [B] each: rewards by name, as `info["reward/<name>"]` reports them.
        images: [k, 3, H, W] of the first k episodes.
    """

    latents: Tensor
    times: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    log_probs: Tensor
    scored: np.ndarray
    returns: Tensor
    prompt_id: np.ndarray
    extras: Mapping[str, Tensor]
    images: Tensor

    @property
    def num_steps(self) -> int:
        """The episodes' length T."""
        return len(self.log_probs)

    @property
    def num_episodes(self) -> int:
        """The number of episodes B."""
        return len(self.returns)

    def observation(self, steps: Tensor, lanes: Tensor) -> dict[str, Tensor]:
        """Return what the policy saw in M transitions, [M, …] each, given their indices on the device."""
        changing = {"latents": self.latents[steps, lanes]} | {k: v[steps, lanes] for k, v in self.times.items()}
        return changing | {key: value[lanes] for key, value in self.constants.items()}

    def action(self, steps: Tensor, lanes: Tensor) -> Tensor:
        """Return what it did in them, [M, …]."""
        return self.latents[steps + 1, lanes]


@dataclass
class _Batch:
    """The episodes of all lanes between two resets, as they come."""

    first: Observation
    latents: list[Tensor]
    prompt_id: np.ndarray
    timestep: list[Tensor] = field(default_factory=list)
    next_timestep: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    scored: list[np.ndarray] = field(default_factory=list)
    rewards: list[Tensor] = field(default_factory=list)
    info: Mapping[str, Any] = field(default_factory=dict)


@torch.no_grad()
def collect(
    env: VectorEnv,
    policy: Policy,
    *,
    seeds: Sequence[int | Sequence[int] | None] = (None,),
    options: Mapping[str, Any] | None = None,
    generators: Generators | None = None,
    reduction: Reduction = "mean",
    after_step: Callable[[], bool] | None = None,
    max_images: int = 16,
) -> Rollout | None:
    """Return one episode of every lane for each seed.

    Args:
        env: A vector environment whose action is the next latents (`metadata["action_is_next_latents"]`).
        policy: What acts.
        seeds: What each reset is given.
        options: What each reset is given.
        generators: Where the policy's draws come from; None: its own generator.
        reduction: How the log-probs that are stored are reduced.
        after_step: Called after each step of the environment; False stops the collection.
        max_images: How many images to keep.

    Returns:
        The rollout; None if `after_step` stopped it.

    Raises:
        ValueError: the environment is of another kind, or its lanes do not end together.
    """
    if not env.metadata.get("action_is_next_latents"):
        raise ValueError(f"{env} is not an environment whose action is the next latents, such as DenoisingMDP-v0")
    batches = []
    for seed in seeds:
        batch = _run(env, policy, seed, options, generators, reduction, after_step)
        if batch is None:
            return None
        batches.append(batch)
    return _assemble(batches, max_images)


def _run(
    env: VectorEnv,
    policy: Policy,
    seed: int | Sequence[int] | None,
    options: Mapping[str, Any] | None,
    generators: Generators | None,
    reduction: Reduction,
    after_step: Callable[[], bool] | None,
) -> _Batch | None:
    observation, info = env.reset(seed=seed, options=options)  # type: ignore[arg-type]
    batch = _Batch(observation, [observation["latents"]], info["prompt_id"])
    ended = np.zeros(env.num_envs, dtype=bool)
    while not ended.any():
        scored = policy.scored(info)
        batch.scored.append(np.ones(env.num_envs, dtype=bool) if scored is None else scored)
        if batch.scored[-1].any():
            action, log_prob = policy.sample(observation, generators=generators, reduction=reduction)
        else:
            action = policy.act(observation, generators=generators)
            log_prob = torch.zeros(env.num_envs, device=action.device)
        batch.timestep.append(observation["timestep"])
        batch.next_timestep.append(observation["next_timestep"])
        batch.latents.append(action)
        batch.log_probs.append(log_prob)
        observation, reward, _, _, info = env.step(action)
        batch.rewards.append(reward)
        ended = info["ended"]
        if after_step is not None and not after_step():
            return None
    if not ended.all():
        raise ValueError("the lanes' episodes must end together: reset them together and give them one length")
    same_step = env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    batch.info = info["final_info"] if same_step else info
    return batch


def _assemble(batches: Sequence[_Batch], max_images: int) -> Rollout:
    """Put the batches side by side, time-major."""

    def side_by_side(name: str) -> Tensor:
        per_step = zip(*(getattr(batch, name) for batch in batches), strict=True)
        return torch.stack([torch.cat(lanes) for lanes in per_step])

    first = batches[0]
    reward_names = [key for key in first.info if key.startswith("reward/")]
    return Rollout(
        latents=side_by_side("latents"),
        times={"timestep": side_by_side("timestep"), "next_timestep": side_by_side("next_timestep")},
        constants={
            key: torch.cat([batch.first[key] for batch in batches]) for key in first.first if key not in _CHANGING
        },
        log_probs=side_by_side("log_probs"),
        scored=np.concatenate([np.stack(batch.scored) for batch in batches], axis=1),
        returns=side_by_side("rewards").sum(0),
        prompt_id=np.concatenate([batch.prompt_id for batch in batches]),
        extras={key: torch.cat([batch.info[key] for batch in batches]) for key in reward_names},
        images=torch.cat([batch.info["images"][:max_images] for batch in batches])[:max_images],
    )
