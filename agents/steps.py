"""Which steps of an episode are stochastic and learnt from, and how much each counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, final, get_args

import numpy as np
import torch
from torch import Tensor

from diffusion_gym.checks import checked_number
from diffusion_gym.envs.contract import TorchVectorEnv
from diffusion_gym.parts import Part

from .experience.rollouts import Rollout
from .experience.seeding import Stream, derived_seed
from .policies import Policy

StepWeights = Literal["equal", "inverse_sensitivity"]


@final
@dataclass(frozen=True)
class Window(Part):
    """So many steps side by side that are stochastic, and learnt from, drawn anew for each rollout.

    The steps around them are deterministic and have no density. Callbacks see the policy as it was made.

    Source: Flow-GRPO-Fast, https://github.com/yifan123/flow_grpo (2 or 3 steps).

    Args:
        size: How many steps.
        within: The steps that the window lies in, from the first up to before the second; None: the first half of the
            episode, as in Flow-GRPO-Fast.

    Raises:
        TypeError: one of them is no whole number of steps, or `within` no pair.
    """

    size: int
    within: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        pair = (0, 0) if self.within is None else self.within
        is_pair = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(step, Integral) for step in pair)
        if not is_pair or not isinstance(self.size, Integral):
            raise TypeError(
                "a window has a whole number of steps, and lies within None or two of them, (from, to); "
                f"got {self.size!r} and {self.within!r}"
            )

    def bounds(self, num_steps: int) -> tuple[int, int]:
        """Return the steps that the window lies in.

        Raises:
            ValueError: it does not fit into them, or they not into the episode.
        """
        low, high = (0, max(num_steps // 2, self.size)) if self.within is None else self.within
        if not 0 <= low < low + self.size <= high <= num_steps:
            raise ValueError(
                f"a window must be of at least 1 step and lie within the {num_steps} steps of an episode; "
                f"got {self.size} steps within {(low, high)}"
            )
        return low, high

    def check(self, policy: Policy, env: TorchVectorEnv) -> None:
        """Raise ValueError if the policy cannot be deterministic outside of the window, or has no density in it."""
        if not policy.moves_latents or env.num_steps is None or not env.times:
            raise ValueError(
                f"a window of stochastic steps needs a policy that moves latents, such as DenoisingPolicy, in an "
                f"environment with a fixed number of steps; got {type(policy).__name__}"
            )
        _, high = bounds = self.bounds(env.num_steps)
        scored = policy.scored({"timestep": env.times[:-1], "next_timestep": env.times[1:]})
        if scored is not None and not scored[high - self.size : high].any():
            raise ValueError(
                f"the range {bounds} allows a window of {self.size} steps without a density: "
                f"steps {np.flatnonzero(~scored).tolist()} have none"
            )

    def of_iteration(self, policy: Policy, env: TorchVectorEnv, *, seed: int, iteration: int) -> Policy:
        """Return the policy that is deterministic outside of this iteration's window."""
        assert env.num_steps is not None
        low, high = self.bounds(env.num_steps)
        start = low + derived_seed(seed, Stream.WINDOW, iteration) % (high - low - self.size + 1)
        return policy.windowed(env.times[start], env.times[start + self.size])


@final
@dataclass(frozen=True)
class Steps(Part):
    """The steps of each episode that an algorithm learns from.

    Args:
        fraction: The share of each episode's steps, drawn for each episode (ddpo-pytorch: `train.timestep_fraction`).
        weights: What multiplies the advantage at each step. "equal", as published: 1. "inverse_sensitivity": the
            inverse of the policy's `sensitivity`, scaled to a mean of 1, so that each step's gradient is noise of about
            the same size. With equal weights the steps whose σ shrinks most give nearly all of the gradient.
            (TempFlow-GRPO weighs by the noise level to the same end, https://arxiv.org/abs/2508.04324.)
        window: Draw and learn from a few steps side by side alone; None: from all.

    Raises:
        TypeError, ValueError: a value is none of those.
    """

    fraction: float = 1.0
    weights: StepWeights = "equal"
    window: Window | None = None

    def __post_init__(self) -> None:
        checked_number("fraction", self.fraction, "(0, 1]")
        if self.weights not in get_args(StepWeights):
            raise ValueError(f"weights must be one of {get_args(StepWeights)}, got {self.weights!r}")
        if self.window is not None and not isinstance(self.window, Window):
            raise TypeError(f"window must be None or a Window, such as Window(4); got {self.window!r}")

    @property
    def are_alike(self) -> bool:
        """Whether all steps are learnt from, and alike."""
        return self.fraction == 1 and self.weights == "equal"

    def check(self, policy: Policy, env: TorchVectorEnv) -> None:
        """Raise ValueError if the policy or the environment has no such steps."""
        if self.window is not None:
            self.window.check(policy, env)
        if self.weights != "equal" and not policy.moves_latents:
            raise ValueError(
                f"weights={self.weights!r} needs a policy that moves latents, such as DenoisingPolicy in "
                f"DenoisingMDP-v0; got {type(policy).__name__}"
            )

    def choose(self, scored: np.ndarray, lanes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps, lanes) of the transitions to learn from, [M] each.

        With a `fraction` below 1 each episode gives a random part of the steps that have a density, drawn for it alone,
        as in ddpo-pytorch; else they come in the order of time.

        Args:
            scored: [T, B] where there is a density.
            lanes: The episodes.
            rng: Draws the order.

        Raises:
            ValueError: no action has a density.
        """
        if self.fraction == 1:
            steps, columns = np.nonzero(scored[:, lanes])
            columns = lanes[columns]
        else:
            times = np.flatnonzero(scored.any(1))
            kept = max(1, int(len(times) * self.fraction))
            drawn = np.stack([rng.permutation(times)[:kept] for _ in lanes], axis=1)
            usable = scored[drawn, np.broadcast_to(lanes, drawn.shape)]
            steps, columns = drawn[usable], np.broadcast_to(lanes, drawn.shape)[usable]
        if not len(steps):
            raise ValueError(
                "none of the actions to learn from has a density: give the policy a stochastic sampler, such as "
                "DDIM(eta=1.0), or one that can be trained"
            )
        return steps, columns


def inverse_sensitivities(policy: Policy, rollout: Rollout) -> Tensor:
    """Return the inverse of the policy's sensitivity at each action that is here, [T, B]; 0 elsewhere."""
    times = (rollout.changing[key].squeeze(-1) for key in ("timestep", "next_timestep"))
    sensitivity = policy.sensitivity(*times)
    assert sensitivity is not None
    weights = torch.zeros_like(rollout.log_probs)
    weights[: len(rollout.actions), rollout.lanes_here] = (1 / sensitivity).to(weights)
    return weights
