"""Evaluations of a policy on fixed seeds and prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from diffusion_gym import transfer

from ..experience.collection import collect
from ..experience.environment import torch_env
from ..experience.rollouts import Keep, Rollout
from ..experience.seeding import derived_generator
from ..policies.base import Policy


def standard_error(values: np.ndarray, prompts: Sequence[str] | None = None) -> float:
    """Return the standard error of the mean of N ≥ 2 values [N], over prompts where these are given.

        √(P/(P − 1)·Σ_p (Σ_{i of p} (v_i − mean))²)/N

    A prompt is then one observation, as images of one prompt are more alike than images of different prompts; with as
    many images of each, the error is that of the prompts' means. With one prompt alone, an image is one observation.

    Source: Liang & Zeger, 1986, the cluster-robust standard error of a mean.

    Args:
        values: [N] the values.
        prompts: [N] the prompt of each value; None: each value is an observation.
    """
    groups = (
        np.arange(len(values))
        if prompts is None or len(set(prompts)) < 2
        else np.unique(prompts, return_inverse=True)[1]
    )
    sums = np.bincount(groups, weights=values - values.mean())
    return float((len(sums) / (len(sums) - 1) * np.square(sums).sum()) ** 0.5 / len(values))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of one episode per seed.

    Args:
        rewards: [N] float32 on the host: the episodes' returns.
        lengths: [N] int64 on the host: the episodes' numbers of steps.
        images: [k, 3, H, W] of the first k ≤ N, on the host.
        prompts: The N prompts.
        seeds: The N seeds.
    """

    rewards: np.ndarray
    lengths: np.ndarray
    images: Tensor
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def mean(self) -> float:
        """The mean reward."""
        return float(self.rewards.mean())

    @property
    def standard_error(self) -> float:
        """The standard error of the mean, over prompts and for this one policy: other trainings differ by more."""
        return standard_error(self.rewards, self.prompts)

    def gain_over(self, before: "Evaluation") -> tuple[float, float]:
        """Return the mean of the paired differences to an evaluation on the same seeds, and its standard error.

        The error is over prompts and for these two policies: trainings with other seeds differ by more.

        Raises:
            ValueError: the other evaluation is of other seeds or prompts.
        """
        if (before.seeds, before.prompts) != (self.seeds, self.prompts):
            raise ValueError("paired evaluations need the same seeds and prompts")
        difference = self.rewards - before.rewards
        return float(difference.mean()), standard_error(difference, self.prompts)


def evaluate(
    env: VectorEnv,
    policy: Policy,
    *,
    seeds: Sequence[int],
    prompts: Sequence[str] | None = None,
    deterministic: bool = False,
    max_images: int = 64,
) -> Evaluation:
    """Return the rewards of one episode per seed, whatever the number of lanes.

    The initial noise and every draw of the policy come from the seed alone, so that two policies are compared on the
    same noise, pair by pair. The algorithms of this package train on seeds from 2**32 up: smaller ones are held out.

    Args:
        env: A vector environment; with autoreset_mode DISABLED where episodes differ in length.
        policy: The policy.
        seeds: [N] a multiple of `env.num_envs`.
        prompts: [N] each episode's prompt; None: for seed k the environment's k-th (modulo their number).
        deterministic: Take the policy's mode instead of draws.
        max_images: The most images to keep.

    Raises:
        ValueError: the numbers of seeds, prompts and lanes do not fit.
    """
    if prompts is None:
        texts = torch_env(env).prompts
        prompts = [texts[int(seed) % len(texts)] for seed in seeds]
    if len(seeds) != len(prompts) or len(seeds) % env.num_envs:
        raise ValueError(
            f"evaluate needs as many prompts as seeds, a multiple of num_envs={env.num_envs}; "
            f"got {len(seeds)} seeds and {len(prompts)} prompts"
        )
    rewards, lengths, images = [], [], []
    for rollout in episodes(
        env, policy, seeds=seeds, prompts=prompts, deterministic=deterministic, max_images=max_images, keep="ends"
    ):
        rewards.append(transfer.to_host(rollout.returns))
        lengths.append(rollout.lengths)
        images.append(torch.from_numpy(transfer.to_host(rollout.images)))
    return Evaluation(
        rewards=np.concatenate(rewards),
        lengths=np.concatenate(lengths),
        images=torch.cat(images),
        prompts=tuple(prompts),
        seeds=tuple(int(seed) for seed in seeds),
    )


def episodes(
    env: VectorEnv,
    policy: Policy,
    *,
    seeds: Sequence[int],
    prompts: Sequence[str],
    deterministic: bool = False,
    max_images: int,
    keep: Keep = "steps",
) -> Iterator[Rollout]:
    """Yield rollouts of one episode per lane, in the order of the seeds; see `evaluate` and `collect`."""
    for start in range(0, len(seeds), env.num_envs):
        part = slice(start, start + env.num_envs)
        rollout = collect(
            env,
            policy,
            seeds=[list(seeds[part])],
            options={"prompt": list(prompts[part])},
            generators=[[derived_generator(int(seed)) for seed in seeds[part]]],
            deterministic=deterministic,
            max_images=max(0, max_images - start),
            keep=keep,
        )
        assert rollout is not None
        yield rollout
