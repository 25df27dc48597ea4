"""What is saved of a run, and how it is loaded: safetensors and JSON, nothing that could run code."""

import hashlib
import inspect
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from gymnasium.vector import VectorEnv

from diffusion_gym.models.base import DiffusionModel

from ..experience.environment import torch_env
from ..logs.reports import RewardingEnv, environment_settings
from ..policies import Policy, load_policy
from ..policies.base import CONFIG_FILE, write_config
from ..training.options import Schedule, Settings
from ..updates.averaging import WeightAverage
from ..updates.distributed import Processes
from ..updates.guard import GradientGuard
from .files import existing_folder, load_optimizer, replaced_folder, save_optimizer
from .manifest import whole_checkpoint, write_manifest

Run = TypeVar("Run", bound="SavedRun")

STATE_FILE = "training_state.json"
_OPTIMIZER_FILE = "optimizer.safetensors"
_AVERAGE_FILE = "averaged_weights.safetensors"
_COUNTERS = ("iteration", "num_updates", "evaluation_queries")
_GIVEN_TO_LOAD = ("policy", "env", "reference", "learning_rate", "seed", "tensorboard_log", "verbose")
# The number of lanes and where they are change no result that is more than rounding; prompts are compared as texts, and
# models by their weights.
_WITHOUT_EFFECT = ("num_envs", "device", "autoreset_mode", "render_mode", "observe_embeds", "prompts", "model")


class SavedEnv(RewardingEnv, Protocol):
    """What is saved of an environment."""

    dtype: torch.dtype
    model: DiffusionModel


class SavedRun:
    """The part of an `Algorithm` that saves and loads; what is said of the attributes there is not said here."""

    policy: Policy
    env: VectorEnv
    optimizer: torch.optim.Optimizer
    guard: GradientGuard
    average: WeightAverage | None
    processes: Processes
    seed: int
    num_timesteps: int
    iteration: int
    reward_queries: int
    num_updates: int
    evaluation_queries: int
    log_identity: str
    settings: Settings
    _at_boundary: Mapping[str, int]
    _reward_at_boundary: Mapping[str, Any]
    callback_states: dict[str, Any]
    _learning_rate: float | Schedule
    _hyperparameters: Mapping[str, Any]

    def _extra_state(self) -> dict[str, Any]:
        """Return what else a resumed run needs, as JSON can hold it."""
        return {}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `_extra_state` returned."""

    def _save_files(self, folder: Path) -> None:
        """Write what else a resumed run needs, and JSON cannot hold, into a checkpoint's folder."""

    def _load_files(self, folder: Path) -> None:
        """Read what `_save_files` wrote."""

    def _mark_boundary(self) -> None:
        """Note what a resumed run begins with: one that is saved within a rollout plays it again."""
        self._at_boundary = {"num_timesteps": self.num_timesteps, "reward_queries": self.reward_queries}
        self._reward_at_boundary = self.env.unwrapped.reward.state_dict()  # type: ignore[attr-defined]

    def remember(self, **arguments: Any) -> None:
        """Note arguments that a subclass's constructor has beside the inherited ones, as JSON can hold them.

        `save` writes them, and `load` gives them to the constructor again.
        """
        self._hyperparameters = {**self._hyperparameters, **arguments}

    def require_savable(self) -> None:
        """Raise TypeError if the constructor has arguments that `load` could not give it again."""
        arguments = inspect.signature(type(self)).parameters.values()
        names = {argument.name for argument in arguments if argument.kind is not argument.VAR_KEYWORD}
        lost = sorted(names - self._hyperparameters.keys() - set(_GIVEN_TO_LOAD))
        if lost:
            raise TypeError(
                f"{type(self).__name__} would be loaded without its own arguments {lost}: call "
                f"self.remember({lost[0]}={lost[0]}, …) in its constructor"
            )

    def save(self, path: str | Path) -> None:
        """Write the trained weights and all that is needed to go on, into a folder.

        The folder takes the place of an earlier one only when it is whole. `unet/` (or the LoRA file) in it opens in
        plain diffusers. A ".zip" at the end of `path`, which SB3's CheckpointCallback adds, is dropped. Of many
        processes the main one writes, and needs no other for it; `processes.wait()` before another reads.

        Raises:
            FileExistsError: there is a file at `path`.
            OSError: the disk is full, or the like; an earlier checkpoint at `path` is still there.
            TypeError: as `require_savable`.
            RuntimeError: the policy has its averaged weights: `policy.save` writes these.
        """
        if self.average is not None and self.average.is_applied:
            raise RuntimeError("within averaged_weights() the run cannot be saved: policy.save writes these weights")
        self.require_savable()
        if not self.processes.is_main:
            return
        env: SavedEnv = self.env.unwrapped  # type: ignore[assignment]
        with replaced_folder(_without_zip(path)) as folder:
            self.policy.save(folder)
            if not (folder / CONFIG_FILE).exists():
                write_config(folder, self.policy)
            self._save_files(folder)
            save_optimizer(self.optimizer, folder / _OPTIMIZER_FILE)
            if self.average is not None:
                self.average.save(folder / _AVERAGE_FILE)
            state = {
                "algorithm": type(self).__name__,
                "hyperparameters": self._hyperparameters,
                "environment": environment_settings(env),
                "told_apart_by": _told_apart_by(env),
                "learning_rate": None if callable(self._learning_rate) else self._learning_rate,
                "seed": self.seed,
                **({} if self.settings.tensorboard_log is None else {"log_identity": self.log_identity}),
                **self._at_boundary,
                **{counter: getattr(self, counter) for counter in _COUNTERS},
                "guard": self.guard.state_dict(),
                "reward": self._reward_at_boundary,
                "extra": self._extra_state(),
                "callbacks": self.callback_states,
            }
            (folder / STATE_FILE).write_text(json.dumps(state, indent=2, default=_plain))
            write_manifest(folder)

    @classmethod
    def load(
        cls: type[Run],
        path: str | Path,
        env: VectorEnv,
        *,
        policy: Policy | None = None,
        reference: Policy | None = None,
        learning_rate: float | Schedule | None = None,
        samples_per_epoch: int | None = None,
        batch_size: int | None = None,
        micro_batch_size: int | None = None,
        group_size: int | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 0,
    ) -> Run:
        """Return a saved run; `learn(total - run.num_timesteps, reset_num_timesteps=False)` continues it.

        Args:
            path: What `save` was given; or a folder of checkpoints, of which the newest whole one is taken, with a
                warning that names newer ones and what is wrong with them.
            env: The environment to go on in.
            policy: A policy of the saved one's shape, to read the weights into; None: one on `env.unwrapped.model`.
            reference: The policy that the run's KL divergence is to, if one was given to it: such a one is not saved.
            learning_rate: None: the saved one. A schedule (a callable) cannot be saved and is to be given again.
            samples_per_epoch: None: the saved one, as of the following; others where the environment has other lanes.
            batch_size: Likewise.
            micro_batch_size: Likewise.
            group_size: Likewise.
            tensorboard_log: As in the constructor.
            verbose: As in the constructor.

        Raises:
            TypeError: `env` is no torch vector environment.
            FileNotFoundError: there is no saved run.
            ValueError: it is damaged, or a run of another algorithm or in an environment of another kind or model, or
                its learning rate was a callable and is not given again.

        Warns:
            UserWarning: the environment has another reward, other prompts, another number of steps or the like than the
                saved one, or a model of other weights.
        """
        torch_env(env)
        folder = whole_checkpoint(existing_folder(_without_zip(path)))
        state = json.loads((folder / STATE_FILE).read_text())
        if state["algorithm"] != cls.__name__:
            raise ValueError(f"{folder} is a run of {state['algorithm']}, not of {cls.__name__}")
        rate = state["learning_rate"] if learning_rate is None else learning_rate
        if rate is None:
            raise ValueError(f"the learning rate of {folder} was a callable: give it again, load(..., learning_rate=…)")
        if policy is None:
            policy = load_policy(folder, model=env.unwrapped.model, device=env.unwrapped.device)  # type: ignore[attr-defined]
        else:
            policy.load_weights(folder)
        given = {} if reference is None else {"reference": reference}
        sizes = {
            "samples_per_epoch": samples_per_epoch,
            "batch_size": batch_size,
            "micro_batch_size": micro_batch_size,
            "group_size": group_size,
        }
        given_sizes = {name: size for name, size in sizes.items() if size is not None}
        run = cls(
            policy,
            env,
            learning_rate=rate,
            seed=state["seed"],
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            **given,
            **{**state["hyperparameters"], **given_sizes},
        )  # type: ignore[call-arg]
        run._restore(folder, state)
        _warn_of_changes(folder, state, env.unwrapped)  # type: ignore[arg-type]
        return run

    def _restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Take back what `save` wrote, but for what the constructor was given."""
        load_optimizer(self.optimizer, folder / _OPTIMIZER_FILE)
        if self.average is not None:
            self.average.load(folder / _AVERAGE_FILE)
        self.guard.load_state_dict(state["guard"])
        self.env.unwrapped.reward.load_state_dict(state.get("reward", {}))  # type: ignore[attr-defined]
        self.num_timesteps, self.reward_queries = state["num_timesteps"], state["reward_queries"]
        self._mark_boundary()
        for counter in _COUNTERS:
            setattr(self, counter, state.get(counter, 0))
        self.log_identity = state.get("log_identity", self.log_identity)
        self.callback_states = state.get("callbacks", {})
        self._load_extra_state(state["extra"])
        self._load_files(folder)


def _told_apart_by(env: SavedEnv) -> dict[str, Any]:
    """Return what tells an environment from others, where what it was made with does not: names may be left out."""
    texts = list(env.prompts)
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    return {
        "reward": env.reward.name,
        "number of prompts": len(texts),
        "SHA-256 of the prompts": digest,
        "dtype": str(env.dtype).removeprefix("torch."),
        "image_size": env.model.image_shape[1],
    }


def _warn_of_changes(folder: Path, state: Mapping[str, Any], env: SavedEnv) -> None:
    """Warn of what changes results, and differs from the environment that a run was saved in."""
    defaults = {name: argument.default for name, argument in inspect.signature(type(env)).parameters.items()}
    now_apart = _told_apart_by(env)
    before, now = (
        {name: value for name, value in {**defaults, **settings}.items() if name not in _WITHOUT_EFFECT} | apart
        for settings, apart in (
            (state["environment"], state.get("told_apart_by", now_apart)),
            (environment_settings(env), now_apart),
        )
    )
    changes = [
        f"{name} is {now[name]!r}, and was {before[name]!r}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]
    if changes:
        warnings.warn(
            f"the run of {folder} goes on in another environment: {'; '.join(changes)}. Its statistics, and its "
            "results so far, are of the other one",
            stacklevel=3,
        )


def _plain(value: Any) -> Any:
    """Return a numpy number as Python's."""
    return value.item()


def _without_zip(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix == ".zip" else path
