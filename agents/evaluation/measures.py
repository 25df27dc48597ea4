"""Measures of a policy on held-out seeds: rewards, features, the KL divergence along its path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.vector import VectorEnv
from torch import Tensor

from diffusion_gym import transfer
from diffusion_gym.naming import unknown_name
from diffusion_gym.rewards import Reward, to_uint8

from ..experience.environment import torch_env
from ..experience.rollouts import Rollout
from ..policies import Policy
from .episodes import episodes

Features = Callable[[Tensor, Tensor], Tensor]
"""(images [B, 3, H, W] in [0, 1], latents x_0 [B, …]) -> [B, F], of length 1."""
FeatureName = Literal["emoji_scorer", "latents"]


@dataclass(frozen=True, eq=False)
class Samples:
    """K images of each of P prompts, all on the host.

    Args:
        prompts: The P prompts.
        rewards: [P, K].
        held_out: [P, K] rewards that nothing was trained for; None: there is no such reward.
        features: [P, K, F], of length 1.
        kl: [P] Σ_t KL(π ‖ reference) in nats, along the path of each prompt's first image; None: not measured, or
            no step of them has a density, as with a deterministic policy.
        images: [P, K, H, W, 3] uint8.
    """

    prompts: tuple[str, ...]
    rewards: np.ndarray
    held_out: np.ndarray | None
    features: np.ndarray
    kl: np.ndarray | None
    images: np.ndarray


def choose_prompts(count: int, most: int) -> list[int]:
    """Return the sorted indices of `most` of `count` prompts, drawn with a fixed seed; all if there are not more."""
    return np.sort(np.random.default_rng(0).permutation(count)[:most]).tolist()


def latent_features(images: Tensor, latents: Tensor) -> Tensor:
    """Return the directions of the latents x_0, [B, D]: features for models that have no others."""
    return F.normalize(latents.flatten(1).float(), dim=1)


def make_features(name: FeatureName) -> Features:
    """Return the features of a name: the emoji scorer's image embeddings, or the latents' directions.

    Raises:
        ValueError: the name is not known.
    """
    if name not in get_args(FeatureName):
        raise ValueError(unknown_name("features", name, get_args(FeatureName)))
    if name == "latents":
        return latent_features
    from diffusion_gym.rewards.emoji_alignment import load_packaged_scorer

    scorer = load_packaged_scorer()
    return lambda images, latents: scorer.to(images.device).embed_images(images.float())


@torch.no_grad()
def path_kl(policy: Policy, reference: Policy, rollout: Rollout, lanes: np.ndarray) -> np.ndarray:
    """Return Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t)) of some episodes of a rollout by π, [len(lanes)], in nats."""
    steps, columns = np.nonzero(rollout.scored[:, lanes])
    total = rollout.returns.new_zeros(rollout.num_episodes)
    for step, lane in rollout.micro_batches(steps, lanes[columns], rollout.num_episodes):
        observation = rollout.observation(step, lane)
        distribution = policy.distribution(observation)
        total = total.index_add(0, lane, distribution.kl(reference.distribution(observation), "sum"))
    return transfer.to_host(total)[lanes]


@torch.no_grad()
def draw_samples(
    env: VectorEnv,
    policy: Policy,
    *,
    prompts: Sequence[str],
    samples_per_prompt: int,
    held_out: Reward | None,
    features: Features,
    reference: Policy | None = None,
) -> Samples:
    """Return K images of each prompt, drawn from the seeds 0 to P·K − 1, which no training uses.

    Two policies that are given the same prompts and K draw pairs of images from the same noise. Where an action is not
    the next latents, the images are encoded for the features' latents.

    Args:
        env: A vector environment with the reward that was trained for.
        policy: The policy.
        prompts: The P prompts; the held-out reward sees the metadata of those in the environment's set.
        samples_per_prompt: The number K of images of each prompt.
        held_out: The held-out reward; None: there is none.
        features: The features that images are compared by.
        reference: The policy to measure the KL divergence to; None: it is not measured.
    """
    count = len(prompts) * samples_per_prompt
    num_episodes = -(-count // env.num_envs) * env.num_envs
    texts = [prompts[index % len(prompts)] for index in range(num_episodes)]
    parts: dict[str, list[np.ndarray]] = {"rewards": [], "held_out": [], "features": [], "kl": [], "images": []}
    base_env = torch_env(env)
    has_density = False
    rollouts = episodes(env, policy, seeds=range(num_episodes), prompts=texts, max_images=num_episodes)
    for start, rollout in zip(range(0, num_episodes, env.num_envs), rollouts, strict=True):
        part = texts[start : start + env.num_envs]
        parts["rewards"].append(transfer.to_host(rollout.returns))
        latents = rollout.ends if base_env.action_is_next_latents else base_env.model.encode(rollout.images)
        parts["features"].append(transfer.to_host(features(rollout.images, latents)))
        parts["images"].append(to_uint8(rollout.images).numpy())
        if held_out is not None:
            values = held_out(rollout.images, part, base_env.prompts.metadata_of(part)).values
            parts["held_out"].append(transfer.to_host(values.float()))
        first_lanes = np.arange(min(env.num_envs, len(prompts) - start))
        if reference is not None and len(first_lanes):
            parts["kl"].append(path_kl(policy, reference, rollout, first_lanes))
            has_density |= bool(rollout.scored[:, first_lanes].any())

    def by_prompt(name: str) -> np.ndarray:
        values = np.concatenate(parts[name])[:count]
        return values.reshape(samples_per_prompt, len(prompts), *values.shape[1:]).swapaxes(0, 1)

    return Samples(
        prompts=tuple(prompts),
        rewards=by_prompt("rewards"),
        held_out=None if held_out is None else by_prompt("held_out"),
        features=by_prompt("features"),
        kl=np.concatenate(parts["kl"]) if has_density else None,
        images=by_prompt("images"),
    )
