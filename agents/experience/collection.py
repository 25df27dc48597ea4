"""Collecting rollouts: whole episodes of a vector environment, all lanes launched together."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv, VectorWrapper

from diffusion_gym.transitions import Reduction

from ..policies.base import Generators, Policy
from .builder import RolloutBuilder
from .environment import check_fit, torch_env
from .rollouts import Keep, Rollout
from .storage import Storage

ResetOptions = Mapping[str, Any] | None


@torch.no_grad()
def collect(
    env: VectorEnv,
    policy: Policy,
    *,
    seeds: Sequence[int | Sequence[int] | None] = (None,),
    options: ResetOptions | Sequence[ResetOptions] = None,
    generators: torch.Generator | Sequence[Generators] | None = None,
    deterministic: bool = False,
    reduction: Reduction = "mean",
    after_step: Callable[[int], bool] | None = None,
    max_images: int = 16,
    storage: Storage | None = None,
    async_rewards: bool = False,
    keep: Keep = "steps",
) -> Rollout | None:
    """Return one episode of every lane for each seed.

    All lanes are launched together and run to the end of their episodes, however long these are: "the first so many
    that end" would be the short ones.

    Args:
        env: A torch vector environment of this package. Where episodes differ in length it needs autoreset_mode
            DISABLED: their lanes rest until all are through.
        policy: The policy that acts.
        seeds: The seed of each reset: an integer, one for each lane, or None.
        options: The options of every reset, or one for each reset.
        generators: What the policy's draws come from: one for all resets, or for each reset one, or one per lane; None:
            the policy's own.
        deterministic: Take the policy's mode instead of draws.
        reduction: How the log-probs that are stored are reduced.
        after_step: Called after each step of the environment with the number of lanes that took it; False stops the
            collection.
        max_images: How many images to keep.
        storage: How latents and features are kept; None: as they come.
        async_rewards: Compute the rewards of one reset's episodes in a thread while the next reset's are drawn.
        keep: "steps": all that is needed to score the actions again; "ends": the last actions (x_0, where the action is
            the next latents) alone, for which nothing is scored.

    Returns:
        The rollout; None if `after_step` stopped it.

    Raises:
        TypeError: the environment is no torch vector environment.
        ValueError: the policy does not fit it; its lanes end apart from each other and reset themselves; its latents
            are of low precision themselves and `storage` names another, or a device that is not there; or
            `async_rewards` with a wrapper that sees the rewards.
    """
    below, storage = torch_env(env), storage or Storage()
    storage.check(below)
    check_fit(env, policy)
    precision = storage.dtype if below.action_is_next_latents else None
    act = partial(policy.act, deterministic=deterministic, precision=precision)
    sample = partial(policy.sample, deterministic=deterministic, precision=precision, reduction=reduction)
    every = [options] * len(seeds) if options is None or isinstance(options, Mapping) else options
    draws = generators if isinstance(generators, Sequence) else [generators] * len(seeds)
    builder = RolloutBuilder(below, len(seeds), storage=storage, keep=keep, max_images=max_images)
    with _deferred_rewards(env) if async_rewards else contextlib.nullcontext():
        for seed, reset_options, drawn_from in zip(seeds, every, draws, strict=True):
            observation, info = env.reset(seed=seed, options=reset_options)  # type: ignore[arg-type]
            observation = storage.rounded(observation, below.large_keys)
            builder.start(observation, info)
            while builder.active.any():
                scored = _scored(policy, info, builder.active, keep)
                if scored.any():
                    action, log_prob = sample(observation, generators=drawn_from)
                else:
                    action, log_prob = act(observation, generators=drawn_from), None
                builder.add(observation, action, log_prob, scored)
                num_acting = int(builder.active.sum())
                observation, rewards, _, _, info = env.step(action)
                observation = storage.rounded(observation, below.large_keys)
                builder.finish(rewards, info)
                if after_step is not None and not after_step(num_acting):
                    return None
        return builder.build()


def _scored(policy: Policy, info: Mapping[str, Any], active: np.ndarray, keep: Keep) -> np.ndarray:
    """Return the lanes whose next actions have a density that is kept, [num_envs] bool."""
    if keep == "ends":
        return np.zeros_like(active)
    with_density = policy.scored(info)
    return active if with_density is None else with_density & active


def _deferred_rewards(env: VectorEnv) -> contextlib.AbstractContextManager[None]:
    """Return the context in which an environment computes rewards in a thread.

    Raises:
        ValueError: a wrapper has a `step`, which would see no rewards.
    """
    wrapper = env
    while isinstance(wrapper, VectorWrapper):
        if type(wrapper).step is not VectorWrapper.step:
            raise ValueError(
                f"async_rewards comes too late for {type(wrapper).__name__}, which sees each step's rewards: "
                "leave it out, or the wrapper"
            )
        wrapper = wrapper.env
    return torch_env(env).deferred_rewards()
