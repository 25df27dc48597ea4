"""The tasks: what is trained, by how many reward queries, and how it is judged.

A task never changes within a version of the protocol: a run says which version it is of, and of which weights.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

import diffusion_gym  # noqa: F401
from diffusion_gym.grids import karras_grid, step_ratios
from diffusion_gym.models.base import DiffusionModel
from diffusion_gym.models.loading import load_model
from diffusion_gym.naming import unknown_name
from diffusion_gym.rewards import Reward

from ..experience.environment import torch_env
from ..experience.rollouts import Rollouts
from ..policies import DenoisingPolicy, Policy, TimePredictor
from ..steps import Steps, Window
from ..updates.optimizers import AdamW, Muon

PROTOCOL = 1
"""The version of the protocol: the tasks below, what is measured, and the score."""

MakePolicy = Callable[[VectorEnv, int], Policy]


def denoiser(env: VectorEnv, seed: int) -> Policy:
    """Return the environment's model as the actor, untrained."""
    return DenoisingPolicy(torch_env(env).model, precision="auto", seed=seed)


def time_predictor(env: VectorEnv, seed: int) -> Policy:
    """Return a time predictor that walks Karras' grid of 12 steps."""
    schedule = torch_env(env).model.schedule
    grid = karras_grid(schedule, 12)
    ratios = dict(zip(grid[:-1].tolist(), step_ratios(schedule, grid).tolist(), strict=True))
    return TimePredictor(env.single_observation_space, initial_ratio=ratios, initial_concentration=30.0, seed=seed)


@dataclass(frozen=True)
class Task:
    """A task of the benchmark.

    Args:
        name: Its name.
        about: What it is, in a sentence.
        model: The model's name, folder or Hub id.
        model_sha256: The digest of the model's folder, see `digest_of`; None: it is not in the package.
        reward: The reward that is trained for.
        held_out: Another, which must not fall.
        tolerance: δ, by how much it may.
        reward_queries: Images that a training may have judged.
        eval_every: Reward queries between two evaluations.
        num_envs: Images drawn together.
        samples_per_prompt: Held-out images of each prompt in an evaluation.
        seeds: The trainings' seeds.
        whole: What a gain of 100 % is, in the reward's unit; None: the pretrained model's mean reward.
        env_id: The environment's id.
        env: Its further keywords.
        make_policy: What an algorithm is given to train.
        settings: The keywords that a policy gradient is given here beside its own: what belongs to the task, not to it.
    """

    name: str
    about: str
    model: str
    model_sha256: str | None
    reward: str | Mapping[str, float]
    held_out: str
    tolerance: float
    reward_queries: int
    eval_every: int
    num_envs: int
    samples_per_prompt: int
    seeds: tuple[int, ...]
    whole: float | None = None
    env_id: str = "DenoisingMDP-v0"
    env: Mapping[str, Any] = field(default_factory=dict)
    make_policy: MakePolicy = denoiser
    settings: Mapping[str, Any] = field(default_factory=dict)

    def make_env(self, reward: Reward | None = None) -> VectorEnv:
        """Return the environment, with the task's reward or one that stands for it."""
        return gym.make_vec(
            self.env_id,
            num_envs=self.num_envs,
            model=load_model(self.model),
            reward=self.reward if reward is None else reward,
            autoreset_mode="DISABLED",
            **self.env,
        )

    def described(self) -> dict[str, Any]:
        """Return the task as JSON can hold it."""
        return {
            "name": self.name,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "reward": self.reward,
            "held_out": self.held_out,
            "tolerance": self.tolerance,
            "whole": self.whole,
            "reward_queries": self.reward_queries,
            "eval_every": self.eval_every,
            "num_envs": self.num_envs,
            "samples_per_prompt": self.samples_per_prompt,
            "env_id": self.env_id,
            "env": {key: list(value) if isinstance(value, tuple) else value for key, value in self.env.items()},
        }


def digest_of(model: DiffusionModel) -> str:
    """Return the SHA-256 of a model's files, names and contents, in the order of their names; of no README."""
    digest = hashlib.sha256()
    for file in sorted(Path(model.path).rglob("*")):
        if file.is_file() and file.suffix != ".md":
            digest.update(f"{file.relative_to(model.path).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


_EMOJI_SHA256 = "6d03d79530116b0e46937ac5f9dcc2962d15d47d628000db4f96afd7edbe239c"
_NOISY = Steps(weights="inverse_sensitivity", window=Window(4, within=(0, 4)))
_EMOJI: dict[str, Any] = {
    "model": "emoji",
    "model_sha256": _EMOJI_SHA256,
    "reward": "incompressibility",
    "held_out": "emoji_alignment",
    "tolerance": 0.02,
    "num_envs": 64,
    "env": {"num_steps": 10},
    "settings": {
        "learning_rate": 1e-3,
        "optimizer": Muon(warmup_updates=4),
        "rollouts": Rollouts(samples=64, group_size=8, prompt_sampling="round_robin"),
        "steps": _NOISY,
    },
}

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="mixture",
            about="Samples of eight Gaussians on a circle of radius 2 (100 %) move to the right, and stay in them.",
            model="mixture",
            model_sha256="17a1dd3bb58ccf0a93e7c7f08e7f1baa20612bb421f7c459a5f616096bea49d6",
            reward="agents.benchmark.plane:rightness",
            held_out="agents.benchmark.plane:plausibility",
            tolerance=0.25,
            reward_queries=7_680,
            eval_every=512,
            num_envs=256,
            samples_per_prompt=32,
            seeds=tuple(range(10)),
            whole=2.0,
            env={"num_steps": 10},
            settings={
                "learning_rate": 3e-3,
                "optimizer": AdamW(warmup_updates=2),
                "rollouts": Rollouts(samples=256, group_size=32, prompt_sampling="round_robin"),
            },
        ),
        Task(
            name="emoji-quick",
            about="Pictures of animals are to be harder to compress: 640 queries, and one seed.",
            reward_queries=640,
            eval_every=320,
            samples_per_prompt=2,
            seeds=(0,),
            **_EMOJI,
        ),
        Task(
            name="emoji",
            about="Pictures of animals are to be harder to compress.",
            reward_queries=1_280,
            eval_every=160,
            samples_per_prompt=4,
            seeds=tuple(range(5)),
            **{**_EMOJI, "num_envs": 32},
        ),
        Task(
            name="time-prediction",
            about="A head chooses the times at which the frozen model is asked: few calls, near the 80-step image.",
            model="emoji",
            model_sha256=_EMOJI_SHA256,
            reward="reference_distance",
            held_out="emoji_alignment",
            tolerance=0.02,
            reward_queries=2_560,
            eval_every=512,
            num_envs=64,
            samples_per_prompt=2,
            seeds=tuple(range(5)),
            env_id="TimePredictionMDP-v0",
            env={"guidance_scale": 2.0, "max_steps": 28, "step_cost": "linear", "step_cost_weight": 1e-3},
            make_policy=time_predictor,
            settings={
                "learning_rate": 3e-3,
                "optimizer": AdamW(weight_decay=0.0),
                "rollouts": Rollouts(samples=256, group_size=8, same_noise=True, num_starts=96),
            },
        ),
        Task(
            name="stable-diffusion",
            about="Stable Diffusion 1.4's animals are to be harder to compress, as in the DDPO paper; for a GPU.",
            model="CompVis/stable-diffusion-v1-4",
            model_sha256=None,
            reward="incompressibility",
            held_out="clip_score",
            tolerance=0.5,
            reward_queries=12_800,
            eval_every=1_280,
            num_envs=64,
            samples_per_prompt=4,
            seeds=tuple(range(5)),
            env={"num_steps": 50},
            settings={
                "learning_rate": 3e-4,
                "rollouts": Rollouts(samples=256, group_size=8, prompt_sampling="round_robin"),
            },
        ),
    )
}


def find_task(name: str) -> Task:
    """Return the task of a name; ValueError: there is none."""
    if name not in TASKS:
        raise ValueError(unknown_name("task", name, tuple(TASKS)))
    return TASKS[name]
