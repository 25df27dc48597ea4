"""The report that `learn` writes into SB3's logger after a rollout and its updates."""

import time
from collections.abc import Mapping

import numpy as np
import torch
from stable_baselines3.common.logger import CSVOutputFormat, HParam, HumanOutputFormat, Image, JSONOutputFormat, Logger
from torch import Tensor

from diffusion_gym import transfer
from diffusion_gym.envs.contract import TorchVectorEnv
from diffusion_gym.parts import described, flattened

from ..experience.rollouts import Rollout
from ..policies import Policy
from .diagnostics import latent_diversity, prompt_table
from .images import captioned_grid

QUANTILES = (5, 25, 50, 75, 95)

_MAIN_METRIC = "rollout/ep_rew_mean"
_TEXT_FORMATS = (HumanOutputFormat, JSONOutputFormat, CSVOutputFormat)
_NOT_AS_TEXT = ("stdout", "log", "json", "csv")
_EXACT_IN_FLOAT = 2**53


class Stopwatch:
    """The seconds of an iteration: of its rollout, of the rewards in it and of its update.

    On a GPU each of them ends where the host waits for the device anyway: the rollout and the reward where the
    environment reads whether the rewards are finite, the update where its metrics are read for the log.

    Args:
        env: The environment, which counts the seconds of decoding and rewarding.
        num_timesteps: The step from which steps per second are counted.
    """

    def __init__(self, env: TorchVectorEnv, num_timesteps: int) -> None:
        self._env = env
        self._first_timestep = num_timesteps
        self._started = time.monotonic()

    def start_rollout(self) -> None:
        """Begin an iteration."""
        self._rollout_started = time.monotonic()
        self._reward_before = self._env.reward_seconds

    def start_update(self) -> None:
        """Begin the update from the rollout that has just ended."""
        self._update_started = time.monotonic()
        self._reward_seconds = self._env.reward_seconds - self._reward_before

    def read(self, num_timesteps: int) -> dict[str, float]:
        """Return the iteration's seconds, and SB3's times of the whole `learn`; the update ends here."""
        now = time.monotonic()
        return {
            "time/rollout_seconds": self._update_started - self._rollout_started - self._reward_seconds,
            "time/reward_seconds": self._reward_seconds,
            "time/train_seconds": now - self._update_started,
            "time/fps": (num_timesteps - self._first_timestep) / (now - self._started),
            "time/time_elapsed": int(now - self._started),
        }


def record_hyperparameters(
    logger: Logger, hyperparameters: Mapping[str, object], *, policy: Policy, env: TorchVectorEnv
) -> None:
    """Record a run's hyperparameters, for TensorBoard's tab of that name; they are written with the first report.

    They are the algorithm's `hyperparameters`, the policy's settings that are scalars, the environment's number of
    lanes, its reward, and the scalars that it was made with. TensorBoard takes the columns from one of the runs that it
    shows: the settings of another algorithm are missing there.
    """
    settings = flattened(
        {
            name: described(value)
            for name, value in vars(policy).items()
            if name != "training" and not name.startswith("_") and not isinstance(value, Mapping)
        }
    )
    scalars = {
        **hyperparameters,
        "policy": type(policy).__name__,
        **{f"policy/{name}": value for name, value in _scalars(settings).items()},
        **{f"env/{name}": value for name, value in environment_settings(env).items()},
        "env/reward": env.reward.name,
    }
    record_settings(logger, scalars, metric=_MAIN_METRIC)


def record_settings(logger: Logger, settings: Mapping[str, object], *, metric: str) -> None:
    """Record settings for TensorBoard's tab of hyperparameters, beside a metric."""
    scalars = {name: _as_hyperparameter(value) for name, value in settings.items()}
    logger.record("hyperparameters", HParam(scalars, {metric: 0.0}), exclude=_NOT_AS_TEXT)


def environment_settings(env: TorchVectorEnv) -> dict[str, bool | int | float | str | None]:
    """Return the scalars that an environment was made with: its id, number of lanes, reward and options.

    A reward or prompts that were given otherwise than by a name or a file's are None: no name could make them anew.
    Both are None for an environment that Gymnasium did not make, whose arguments are unknown.
    """
    keywords = {"prompts": None, "reward": None} if env.spec is None else env.spec.kwargs
    unknown = {name: None for name in ("prompts", "reward") if name in keywords}
    return {
        **({} if env.spec is None else {"id": env.spec.id}),
        "reward": env.reward.name,
        **unknown,
        **_scalars(keywords),
        "num_envs": env.num_envs,
        "negative_prompt": env.negative_prompt,
        "observe_embeds": env.observe_embeds,
    }


def _scalars(settings: Mapping[str, object]) -> dict[str, bool | int | float | str | None]:
    return {
        name: value for name, value in settings.items() if value is None or isinstance(value, bool | int | float | str)
    }


def _as_hyperparameter(value: object) -> str | float:
    """Return a number as it is where a float holds it, and all else as text: TensorBoard leaves out None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _EXACT_IN_FLOAT
    return value if is_number else str(value)  # type: ignore[return-value]


def report(
    logger: Logger,
    rollout: Rollout,
    metrics: Mapping[str, Tensor],
    *,
    env: TorchVectorEnv,
    stopwatch: Stopwatch,
    num_timesteps: int,
    counters: Mapping[str, float],
) -> None:
    """Record the statistics of a rollout and of its updates.

    The numbers are read from the device at once, which waits for it; the images are read too, where an output of the
    logger can show them.

    Args:
        logger: SB3's logger; it is not dumped here.
        rollout: The rollout.
        metrics: Scalars of the updates, recorded as `train/…`.
        env: The environment of the rollout.
        stopwatch: The stopwatch that was started with the rollout.
        num_timesteps: Environment steps so far.
        counters: Further scalars by their full names.
    """
    valid = rollout.valid
    numbers = {"returns": rollout.returns, **rollout.extras, **{f"train/{name}": metrics[name] for name in metrics}}
    if env.action_is_next_latents:
        diversity = latent_diversity(rollout.ends, rollout.prompt_id)
        numbers |= {} if diversity is None else {"rollout/latent_diversity": diversity}
    host_numbers = read_numbers(numbers)
    seconds = stopwatch.read(num_timesteps)
    all_returns, rewards = host_numbers.pop("returns"), {name: host_numbers.pop(name) for name in rollout.extras}
    returns = all_returns[valid]
    scalars = {
        _MAIN_METRIC: returns.mean(),
        "rollout/ep_rew_std": returns.std(),
        "rollout/ep_len_mean": rollout.lengths.mean(),
        **{f"rollout/ep_rew_q{percent:02}": np.percentile(returns, percent) for percent in QUANTILES},
        **{f"rollout/{name}": values[valid].mean() for name, values in rewards.items()},
        **({} if valid.all() else {"rollout/invalid_rewards": np.sum(~valid)}),
        **host_numbers,
    }
    for name, value in {**{name: float(scalars[name]) for name in scalars}, **counters, **seconds}.items():
        logger.record(name, value)
    if all(isinstance(output, _TEXT_FORMATS) for output in logger.output_formats):
        return
    pictures: dict[str, object] = {
        "rollout/ep_rew": returns,
        "rollout/prompts": prompt_table(returns, rollout.prompt_id[valid], env.prompts.texts),
    }
    if len(rollout.images):
        texts = [env.prompts[index] for index in rollout.prompt_id[: len(rollout.images)]]
        shown_rewards = rewards[f"reward/{env.reward.name}"]
        unit = "" if env.reward.unit == "1" else f" {env.reward.unit}"
        captions = [
            (text, f"{reward:#.3g}".rstrip(".") + unit) for text, reward in zip(texts, shown_rewards, strict=False)
        ]
        pictures["images/samples"] = Image(captioned_grid(rollout.images, captions), "HWC")
    for name, picture in pictures.items():
        logger.record(name, picture, exclude=_NOT_AS_TEXT)


def read_numbers(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return tensors on the host as float32, read all at once from the device of the first: waits for it."""
    device = next(iter(tensors.values())).device
    flat = transfer.to_host(
        torch.cat([tensor.detach().to(device, torch.float32).flatten() for tensor in tensors.values()])
    )
    ends = np.cumsum([tensor.numel() for tensor in tensors.values()])
    parts = zip(tensors.items(), np.split(flat, ends[:-1]), strict=True)
    return {name: part.reshape(tuple(tensor.shape)) for (name, tensor), part in parts}
