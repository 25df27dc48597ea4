"""What all algorithms share, in Stable-Baselines3's manners: learn, predict, save, load, callbacks, logger.

SB3's `BaseAlgorithm` itself wants a numpy VecEnv, finite action bounds and pickle, so it is not subclassed; its
callbacks, its logger and its scalar names are used as they are.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.logger import Image, Logger
from stable_baselines3.common.utils import configure_logger
from torch import Tensor

from diffusion_gym.transitions import Reduction

from .files import existing_folder, load_optimizer, replaced_folder, save_optimizer
from .images import image_grid
from .policies import Policy, load_policy
from .rollouts import Rollout, collect
from .seeding import derived_generator, derived_seed, training_seed

Schedule = Callable[[float], float]
MaybeCallback = BaseCallback | Sequence[BaseCallback] | Callable[[dict[str, Any], dict[str, Any]], bool] | None
Metrics = Mapping[str, Tensor]
Self = TypeVar("Self", bound="Algorithm")

_STATE_FILE = "training_state.json"
_OPTIMIZER_FILE = "optimizer.safetensors"
ENV_STREAM, _POLICY_STREAM, _UPDATE_STREAM = range(3)
_LOGGED_IMAGES = 16


class Options(TypedDict, total=False):
    """The keywords that every algorithm takes; see `Algorithm`."""

    learning_rate: float | Schedule
    samples_per_epoch: int | None
    batch_size: int | None
    micro_batch_size: int | None
    max_grad_norm: float | None
    adam_beta1: float
    adam_beta2: float
    adam_weight_decay: float
    adam_epsilon: float
    use_8bit_adam: bool
    tensorboard_log: str | None
    verbose: int
    seed: int | None


class Algorithm(ABC):
    """A policy-gradient algorithm: collect whole episodes, update, log, repeat.

    Every random number of a run is a function of `seed` and the iteration, so a loaded run goes on exactly where it
    was saved.

    Args:
        policy: What is trained.
        env: A torch vector environment.
        log_prob_reduction: How log-probs are reduced over an action's dimensions.
        n_epochs: Passes over a rollout.
        own: A subclass's keywords that JSON can hold, for `save`; `load` gives them to the constructor again.
        learning_rate: AdamW's, or a function of the remaining progress (1 … 0).
        samples_per_epoch: Images per rollout, a multiple of `env.num_envs`; None: `env.num_envs`. (ddpo-pytorch:
            `sample.batch_size` × `sample.num_batches_per_epoch`.)
        batch_size: Images per optimizer step, a divisor of `samples_per_epoch`; None: all of them. (ddpo-pytorch:
            `train.batch_size` × `train.gradient_accumulation_steps`.)
        micro_batch_size: Transitions per forward and backward pass; None: `env.num_envs`. Only memory and speed
            depend on it; with the rollout's own batch size the ratio is exactly 1 before the first update.
        max_grad_norm: The gradient is clipped to this norm; None: not at all.
        adam_beta1: AdamW's β₁.
        adam_beta2: AdamW's β₂.
        adam_weight_decay: AdamW's weight decay.
        adam_epsilon: AdamW's ε.
        use_8bit_adam: bitsandbytes' 8-bit AdamW (needs a GPU and `pip install bitsandbytes`).
        tensorboard_log: Folder for TensorBoard; None: no such log.
        verbose: 1 prints the log's table.
        seed: Of everything that is drawn in training; None: one is drawn.

    Attributes:
        num_timesteps: Environment steps so far, over all lanes.
        iteration: Rollouts learnt from so far.
        reward_queries: Images rewarded so far.
        logger: SB3's logger.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its range, or the sizes do not divide each
            other.
    """

    logger: Logger

    def __init__(
        self,
        policy: Policy,
        env: VectorEnv,
        *,
        log_prob_reduction: Reduction,
        own: Mapping[str, Any],
        n_epochs: int = 1,
        learning_rate: float | Schedule = 1e-5,
        samples_per_epoch: int | None = None,
        batch_size: int | None = None,
        micro_batch_size: int | None = None,
        max_grad_norm: float | None = 1.0,
        adam_beta1: float = 0.9,
        adam_beta2: float = 0.999,
        adam_weight_decay: float = 1e-4,
        adam_epsilon: float = 1e-8,
        use_8bit_adam: bool = False,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
    ) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a Policy, such as DenoisingPolicy(env.unwrapped.model); got {policy!r}")
        if not isinstance(env, VectorEnv) or not env.metadata.get("torch"):
            raise TypeError(f"env must be a torch vector environment: gym.make_vec(id, num_envs=…); got {env}")
        self.samples_per_epoch = env.num_envs if samples_per_epoch is None else samples_per_epoch
        self.batch_size = self.samples_per_epoch if batch_size is None else batch_size
        self.micro_batch_size = env.num_envs if micro_batch_size is None else micro_batch_size
        self.n_epochs = n_epochs
        if self.samples_per_epoch < 1 or self.samples_per_epoch % env.num_envs:
            raise ValueError(
                f"samples_per_epoch must be a multiple of the environment's num_envs ({env.num_envs}), "
                f"got {self.samples_per_epoch}"
            )
        if self.batch_size < 1 or self.samples_per_epoch % self.batch_size:
            raise ValueError(
                f"batch_size must divide samples_per_epoch ({self.samples_per_epoch}), got {self.batch_size}"
            )
        for name in ("micro_batch_size", "n_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.policy = policy
        self.env = env
        self.log_prob_reduction: Reduction = log_prob_reduction
        self.max_grad_norm = max_grad_norm
        self.tensorboard_log = tensorboard_log
        self.verbose = verbose
        self.seed = derived_seed(time.time_ns()) if seed is None else seed
        self.num_timesteps = self.iteration = self.reward_queries = self.num_updates = 0
        self._timesteps_at_boundary = 0
        self._progress_remaining = 1.0
        self._learning_rate = learning_rate
        self._has_own_logger = False
        self._hyperparameters = {
            **own,
            "samples_per_epoch": samples_per_epoch,
            "batch_size": batch_size,
            "micro_batch_size": micro_batch_size,
            "max_grad_norm": max_grad_norm,
            "adam_beta1": adam_beta1,
            "adam_beta2": adam_beta2,
            "adam_weight_decay": adam_weight_decay,
            "adam_epsilon": adam_epsilon,
            "use_8bit_adam": use_8bit_adam,
        }
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError(f"{type(policy).__name__} has nothing to train")
        self.optimizer = _make_adamw(use_8bit_adam)(
            trained,
            lr=self._current_learning_rate(),
            betas=(adam_beta1, adam_beta2),
            weight_decay=adam_weight_decay,
            eps=adam_epsilon,
        )

    # ------------------------------------------------------------------ what an algorithm has to provide
    @abstractmethod
    def train(self, rollout: Rollout) -> Metrics:
        """Update the policy from one rollout; return scalars to log, each a tensor on the device."""

    def _extra_state(self) -> dict[str, Any]:
        """Return what else a resumed run needs, as JSON can hold it."""
        return {}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `_extra_state` returned."""

    @property
    def behaviour(self) -> Policy:
        """The policy that rollouts are collected with: the one that is trained, unless an algorithm says otherwise."""
        return self.policy

    def _save_files(self, folder: Path) -> None:
        """Write what else a resumed run needs, and JSON cannot hold, into a checkpoint's folder."""

    def _load_files(self, folder: Path) -> None:
        """Read what `_save_files` wrote."""

    # ------------------------------------------------------------------ SB3's interface
    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.policy.device

    def get_env(self) -> VectorEnv:
        """Return the environment (asked for by SB3's callbacks)."""
        return self.env

    def get_vec_normalize_env(self) -> None:
        """Return None: there is no SB3 normalisation here (asked for by SB3's callbacks)."""

    def set_logger(self, logger: Logger) -> None:
        """Log to this SB3 logger instead of the one that `learn` would make."""
        self.logger = logger
        self._has_own_logger = True

    def learn(
        self: Self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train until `total_timesteps` environment steps have been taken.

        Args:
            total_timesteps: Steps of all episodes together; the last rollout is finished.
            callback: SB3 callbacks, or a function of (locals, globals). From `on_rollout_end` on, `locals["returns"]`
                are the rollout's rewards, [B].
            log_interval: Rollouts between two entries in the log; 0: none.
            tb_log_name: The run's name in TensorBoard; None: the algorithm's.
            reset_num_timesteps: Count from 0; False goes on with the counts (after `load`), and `total_timesteps` are
                taken on top.
            progress_bar: Show one.
        """
        if reset_num_timesteps:
            self.num_timesteps = self._timesteps_at_boundary = 0
        else:
            total_timesteps += self.num_timesteps
        if not self._has_own_logger:
            name = tb_log_name or type(self).__name__
            self.logger = configure_logger(self.verbose, self.tensorboard_log, name, reset_num_timesteps)
        callbacks = self._callbacks(callback, progress_bar)
        callbacks.init_callback(self)  # type: ignore[arg-type]
        callbacks.on_training_start(locals(), globals())
        started, timesteps_before = time.monotonic(), self.num_timesteps
        while self.num_timesteps < total_timesteps:
            self._progress_remaining = 1 - self.num_timesteps / total_timesteps
            rollout = self._collect(callbacks)
            if rollout is None:
                break
            collected = time.monotonic()
            metrics = self.train(rollout)
            self.iteration += 1
            self._timesteps_at_boundary = self.num_timesteps
            if log_interval and self.iteration % log_interval == 0:
                self._log(rollout, metrics)
                elapsed = time.monotonic() - started
                self.logger.record("time/train_seconds", time.monotonic() - collected)
                self.logger.record("time/fps", (self.num_timesteps - timesteps_before) / elapsed)
                self.logger.record("time/time_elapsed", int(elapsed))
                self.logger.dump(step=self.num_timesteps)
        callbacks.on_training_end()
        return self

    def predict(
        self,
        observation: Mapping[str, np.ndarray | Tensor],
        state: None = None,
        episode_start: None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray | Tensor, None]:
        """Return actions, and None as the (absent) recurrent state.

        Args:
            observation: Of the vector environment (tensors, [num_envs, …]) or of the single one (numpy).
            state: Ignored; there for SB3's `evaluate_policy` and the like.
            episode_start: Ignored, likewise.
            deterministic: Take the distribution's mode.
        """
        if all(isinstance(value, Tensor) for value in observation.values()):
            return self.policy.act(observation, deterministic=deterministic), None  # type: ignore[arg-type]
        batch = {key: torch.as_tensor(value)[None].to(self.policy.device) for key, value in observation.items()}
        return self.policy.act(batch, deterministic=deterministic)[0].float().cpu().numpy(), None

    def save(self, path: str | Path) -> None:
        """Write the trained weights and all that is needed to go on, into a folder.

        The folder takes the place of an earlier one only when it is whole. `unet/` (or the LoRA file) in it opens in
        plain diffusers. A ".zip" at the end of `path`, which SB3's CheckpointCallback adds, is dropped.
        """
        with replaced_folder(_without_zip(path)) as folder:
            self.policy.save(folder)
            self._save_files(folder)
            save_optimizer(self.optimizer, folder / _OPTIMIZER_FILE)
            state = {
                "algorithm": type(self).__name__,
                "hyperparameters": self._hyperparameters,
                "learning_rate": None if callable(self._learning_rate) else self._learning_rate,
                "seed": self.seed,
                "num_timesteps": self._timesteps_at_boundary,
                "iteration": self.iteration,
                "reward_queries": self.reward_queries,
                "num_updates": self.num_updates,
                "extra": self._extra_state(),
            }
            (folder / _STATE_FILE).write_text(json.dumps(state, indent=2))

    @classmethod
    def load(
        cls: type[Self],
        path: str | Path,
        env: VectorEnv,
        *,
        policy: Policy | None = None,
        reference: Policy | None = None,
        learning_rate: float | Schedule | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 0,
    ) -> Self:
        """Return a saved run; `learn(..., reset_num_timesteps=False)` continues it.

        Args:
            path: What `save` was given.
            env: The environment to go on in.
            policy: A policy of the saved one's shape, to read the weights into; None: one on `env.unwrapped.model`.
            reference: The policy that the run's KL divergence is to, if it has one; it is not saved.
            learning_rate: None: the saved one. A schedule (a callable) cannot be saved and is to be given again.
            tensorboard_log: As in the constructor.
            verbose: As in the constructor.

        Raises:
            FileNotFoundError: there is no saved run.
            ValueError: it is a run of another algorithm, or its learning rate was a callable and is not given again.
        """
        folder = existing_folder(_without_zip(path))
        state = json.loads((folder / _STATE_FILE).read_text())
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
        algorithm = cls(
            policy,
            env,
            learning_rate=rate,
            seed=state["seed"],
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            **given,  # type: ignore[arg-type]
            **state["hyperparameters"],
        )
        load_optimizer(algorithm.optimizer, folder / _OPTIMIZER_FILE)
        algorithm.num_timesteps = algorithm._timesteps_at_boundary = state["num_timesteps"]
        for counter in ("iteration", "reward_queries", "num_updates"):
            setattr(algorithm, counter, state[counter])
        algorithm._load_extra_state(state["extra"])
        algorithm._load_files(folder)
        return algorithm

    # ------------------------------------------------------------------ its parts
    def _callbacks(self, callback: MaybeCallback, progress_bar: bool) -> BaseCallback:
        if isinstance(callback, Sequence):
            callback = CallbackList(list(callback))
        elif callback is None:
            callback = CallbackList([])
        elif not isinstance(callback, BaseCallback):
            callback = ConvertCallback(callback)
        return CallbackList([callback, ProgressBarCallback()]) if progress_bar else callback

    def _collect(self, callbacks: BaseCallback) -> Rollout | None:
        """Return the next rollout, or None when a callback ends the training."""

        def after_step(lanes: int) -> bool:
            self.num_timesteps += lanes
            callbacks.update_locals({"self": self})
            return callbacks.on_step()

        callbacks.on_rollout_start()
        starts = [self._start(batch) for batch in range(self.samples_per_epoch // self.env.num_envs)]
        rollout = collect(
            self.env,
            self.behaviour,
            seeds=[seed for seed, _ in starts],
            options=[options for _, options in starts],
            generators=derived_generator(self.seed, _POLICY_STREAM, self.iteration),
            reduction=self.log_prob_reduction,
            after_step=after_step,
            max_images=_LOGGED_IMAGES,
        )
        if rollout is not None:
            self.reward_queries += rollout.num_episodes
            callbacks.update_locals({"returns": rollout.returns})
            callbacks.on_rollout_end()
        return rollout

    def _start(self, batch: int) -> tuple[int | Sequence[int], Mapping[str, Any] | None]:
        """Return the seed and the options of the reset that begins a batch of this iteration."""
        return training_seed(self.seed, ENV_STREAM, self.iteration, batch), None

    def _update_generator(self) -> np.random.Generator:
        """Return the generator of this iteration's shuffles."""
        return np.random.default_rng(derived_seed(self.seed, _UPDATE_STREAM, self.iteration))

    def _current_learning_rate(self) -> float:
        rate = self._learning_rate
        return float(rate(self._progress_remaining)) if callable(rate) else float(rate)

    def _optimizer_step(self) -> Tensor:
        """Apply the accumulated gradient; return its norm before clipping."""
        parameters = self.optimizer.param_groups[0]["params"]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = self._current_learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        return norm

    def _log(self, rollout: Rollout, metrics: Metrics) -> None:
        """Record what a rollout and its updates were like; waits for the device."""
        record = self.logger.record
        record("rollout/ep_rew_mean", self._read(rollout.returns.mean()))
        record("rollout/ep_rew_std", self._read(rollout.returns.std(correction=0)))
        record("rollout/ep_len_mean", float(rollout.lengths.mean()))
        for name, values in rollout.extras.items():
            record(f"rollout/{name}", self._read(values.mean()))
        for name, value in metrics.items():
            record(f"train/{name}", self._read(value))
        record("train/learning_rate", self._current_learning_rate())
        record("train/n_updates", self.num_updates)
        record("time/iterations", self.iteration)
        record("time/total_timesteps", self.num_timesteps)
        record("time/reward_queries", self.reward_queries)
        if self.tensorboard_log:
            grid = image_grid(rollout.images.cpu(), columns=8)
            record("images/samples", Image(grid, "CHW"), exclude=("stdout", "log", "json", "csv"))

    @staticmethod
    def _read(value: Tensor) -> float:
        """Read a scalar from the device: waits for it."""
        return float(value)


def mean_of(updates: Iterable[Metrics]) -> Metrics:
    """Return the mean over updates of each scalar that they return."""
    totals: dict[str, list[Tensor]] = {}
    for metrics in updates:
        for name, value in metrics.items():
            totals.setdefault(name, []).append(value)
    return {name: torch.stack(values).mean() for name, values in totals.items()}


def _make_adamw(use_8bit_adam: bool) -> type[torch.optim.AdamW]:
    if not use_8bit_adam:
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit


def _without_zip(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix == ".zip" else path
