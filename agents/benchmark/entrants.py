"""Who takes part: the algorithms of this package by their names, and anyone's class or function."""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from gymnasium.vector import VectorEnv

from diffusion_gym.naming import unknown_name

from ..advantages import Groups, PerPrompt
from ..ddpo import DDPOIS, DDPOSF
from ..experience.environment import torch_env
from ..grpo import GRPO
from ..nft import DiffusionNFT
from ..policies import Policy
from ..rloo import RLOO
from ..rwr import RWR, Best, Softmax
from ..training.algorithm import Algorithm
from ..training.policy_gradient import PolicyGradient
from ..training.regression import Noising
from .tasks import Task

Entrant = Callable[..., Algorithm | Policy | Iterator[Policy]]
"""(env, budget, seed) -> an algorithm that will be told to learn, or the trained policy, or a policy again and again
while it is trained: each time it may be judged."""

_PUBLISHED_NUMBERS = 16_384
"""The numbers in the latents that the published clip range, 1e-4, is for: it is of means of log-probs over them."""

_RWR = {"learning_rate": 1e-4, "noising": Noising(draws=4)}
_NFT = {"learning_rate": 3e-4, "noising": Noising(draws=8, time_range=(0.8, 1.0), common=True)}
ENTRANTS: Mapping[str, tuple[type[Algorithm], Mapping[str, Any]]] = {
    "DDPO-IS": (DDPOIS, {"batch_size": 32, "advantages": PerPrompt(16, min_count=4, center=True)}),
    "DDPO-SF": (DDPOSF, {"advantages": PerPrompt(16, min_count=4, center=True)}),
    "RLOO": (RLOO, {"advantages": Groups(scale="rollout")}),
    "GRPO": (GRPO, {"advantages": Groups("group_mean", scale="group")}),
    "RWR": (RWR, _RWR | {"weights": Softmax(3.0, per_prompt=True)}),
    "RWR-sparse": (RWR, _RWR | {"weights": Best(1 / 8, per_prompt=True)}),
    "NFT": (DiffusionNFT, _NFT | {"advantages": PerPrompt(8, min_count=4, clip=None)}),
}
"""The algorithms of this package: each with what is its own, beside the task's settings."""


def make_algorithm(
    kind: type[Algorithm], task: Task, env: VectorEnv, seed: int, own: Mapping[str, Any] | None = None
) -> Algorithm:
    """Return an algorithm on the task's policy, with the task's settings and over these its own.

    Of the task's settings it is given those that its class has a keyword for; the published clip range is scaled to
    the numbers in the model's latents, where the policy moves these.
    """
    policy = task.make_policy(env, seed)
    known = {one.name for one in fields(kind)}
    settings = {name: value for name, value in task.settings.items() if name in known}
    if issubclass(kind, PolicyGradient) and "clip_range" in known and policy.moves_latents:
        latents = torch_env(env).model.latent_shape
        settings["clip_range"] = 1e-4 * _PUBLISHED_NUMBERS / (latents[0] * latents[1] * latents[2])
    return kind(policy, env, seed=seed, **{**settings, **(own or {})})


def find_entrant(name: str) -> Entrant:
    """Return who a name stands for: one of this package's algorithms, or `module:name`.

    A class with the interface of this package's algorithms is made with the task's settings. Any other callable is
    called with `(env, budget, seed)`, see `Entrant`. Modules are also looked for in the working directory.

    Raises:
        ValueError: there is nothing of that name, or it cannot be called.
    """
    if name in ENTRANTS:
        return _of_class(*ENTRANTS[name])
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            unknown_name("algorithm", name, tuple(ENTRANTS)) + " Your own is named as package.module:Class."
        )
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    module = importlib.import_module(module_name)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ValueError(f"{module_name} has no class or function {attribute!r} (algorithm {name!r})")
    return _of_class(found, {}) if isinstance(found, type) and issubclass(found, Algorithm) else found


def _of_class(kind: type[Algorithm], own: Mapping[str, Any]) -> Entrant:
    def make(env: VectorEnv, budget: Any, seed: int) -> Algorithm:
        return make_algorithm(kind, budget.task, env, seed, own)

    return make
