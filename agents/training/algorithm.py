"""What all algorithms share, in Stable-Baselines3's manners: learn, predict, save, load, callbacks, logger.

SB3's `BaseAlgorithm` itself wants a numpy VecEnv, finite action bounds and pickle, so it is not subclassed; its
callbacks, its logger and its scalar names are used as they are.
"""

import contextlib
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, final

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.logger import Logger
from torch import Tensor
from typing_extensions import Unpack

from diffusion_gym.checks import checked_integer, checked_number
from diffusion_gym.transitions import Reduction

from ..experience.collection import collect
from ..experience.environment import check_fit, torch_env
from ..experience.rollouts import Keep, Rollout, Rollouts
from ..experience.seeding import derived_generator, derived_seed
from ..experience.starts import Starts
from ..logs.diagnostics import Metrics
from ..logs.reports import Stopwatch, record_hyperparameters, report
from ..logs.run_log import RunLogger, new_identity, own_folder
from ..policies import Policy
from ..runs.saving import SavedRun
from ..updates.averaging import WeightAverage
from ..updates.distributed import Processes, gathered
from ..updates.guard import GradientGuard
from .options import Options, Settings, require_known

MaybeCallback = BaseCallback | Sequence[BaseCallback] | Callable[[dict[str, Any], dict[str, Any]], bool] | None
Self = TypeVar("Self", bound="Algorithm")

_POLICY_STREAM, _UPDATE_STREAM = 1, 2
_SIZES = (
    "; what you did not give is a default, or the saved run's: give samples_per_epoch, batch_size and group_size that "
    "fit num_envs, to load too"
)


class _ProgressBar(ProgressBarCallback):
    """SB3's, but for the steps of all processes, and only those that were taken."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._shown = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.num_timesteps - self._shown)
        self._shown = self.num_timesteps
        return True


class Algorithm(SavedRun, ABC):
    """A policy-gradient algorithm: collect whole episodes, update, log, repeat.

    Every random number of a run is a function of `seed` and the iteration, so a loaded run goes on exactly where it
    was saved.

    A subclass gives `train`, which calls `backward(loss)` and `optimizer_step()` in the place of torch's: so gradients
    are scaled, checked, clipped and summed over processes, and updates are counted and averaged.

    In an environment with on_invalid_reward="nan", episodes whose reward is NaN or infinite are left out of advantages,
    losses and statistics, and counted as `rollout/invalid_rewards`; else such a reward raises.

    Launched by accelerate, many processes train one policy, each with an environment of its own (see
    `agents.updates.distributed`). Callbacks run in all of them; when one ends the training, all stop after the rollout.
    Logs and saved folders are written by the main process.

    Args:
        policy: What is trained.
        env: A torch vector environment.
        log_prob_reduction: How log-probs are reduced over an action's dimensions.
        n_epochs: Passes over a rollout.
        own: A subclass's keywords that JSON can hold, for `save`; `load` gives them to the constructor again.
        options: Those that `agents.training.options.Settings` describes.

    Attributes:
        settings: What it was told.
        policy: What is trained.
        optimizer: Its optimizer; `optimizer_step` steps it.
        micro_batch_size: Transitions that a forward and backward pass is to hold.
        num_timesteps: Environment steps so far, over all lanes.
        iteration: Rollouts learnt from so far.
        reward_queries: Images of the training rewarded so far.
        evaluation_queries: Images that callbacks had rewarded besides, to judge the policy; they add what they ask for.
        num_updates: Optimizer steps so far.
        callback_states: What callbacks keep in checkpoints, each under a name of its own, as JSON can hold it.
        guard: Counts the updates that were left out (`guard.num_skipped`, `guard.num_overflows`).
        logger: SB3's logger.
        processes: The processes that train together.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its range, the sizes do not divide each other,
            or the policy does not fit the environment.
    """

    logger: Logger
    samples_per_epoch: int
    batch_size: int
    micro_batch_size: int
    group_size: int
    keep: Keep = "steps"
    """What of a rollout `train` looks at: see `collect`."""

    def __init__(
        self,
        policy: Policy,
        env: VectorEnv,
        *,
        log_prob_reduction: Reduction,
        own: Mapping[str, Any],
        n_epochs: int = 1,
        **options: Unpack[Options],
    ) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a Policy, such as DenoisingPolicy(env.unwrapped.model); got {policy!r}")
        below = torch_env(env)
        self.processes = Processes()
        self.policy = policy
        self.env = env
        self._check_fit()
        require_known(type(self), options)
        self.settings = Settings(**options)
        self.n_epochs = n_epochs
        self._set_sizes()
        self.storage = self.settings.storage()
        self.storage.check(below)
        self.log_prob_reduction: Reduction = log_prob_reduction
        seed = self.settings.seed
        seed = derived_seed(time.time_ns()) if seed is None else checked_integer("seed", seed, at_least=0)
        self.seed = self.processes.from_main(seed)
        self.num_timesteps = self.iteration = self.reward_queries = self.evaluation_queries = self.num_updates = 0
        self.callback_states: dict[str, Any] = {}
        self._mark_boundary()
        weights = env.unwrapped.prompts.weights or ()  # type: ignore[attr-defined]
        if self.settings.prompt_sampling == "round_robin" and len(set(weights)) > 1:
            warnings.warn(
                'prompt_sampling="round_robin" takes every prompt as often as any other: the weights that prompts have '
                'are not looked at; "random" does so',
                stacklevel=2,
            )
        if self.processes.count > 1 and self._reward_at_boundary:
            raise ValueError(
                f"each process would have its own statistics of the reward {env.unwrapped.reward.name!r}: "  # type: ignore[attr-defined]
                "give them to it, Normalised(reward, mean=…, std=…)"
            )
        self._progress_remaining = 1.0
        self._learning_rate = self.settings.learning_rate
        self._has_own_logger = False
        self.logger = Logger(None, [])
        self.log_identity = new_identity()
        sizes = {"samples_per_epoch": self.samples_per_epoch, "batch_size": self.batch_size}
        self._hyperparameters = {**own, **self.settings.hyperparameters(), **sizes}
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError(f"{type(policy).__name__} has nothing to train")
        self.processes.join(trained)
        self.optimizer = self.settings.make_optimizer(trained, self._current_learning_rate())
        self._steps_taken = 0
        self.optimizer.register_step_post_hook(self._count_step)
        on_nonfinite, ema_decay = self.settings.on_nonfinite, self.settings.ema_decay
        self.guard = GradientGuard(policy.device, on_nonfinite=on_nonfinite, scale_losses=policy.needs_loss_scaling)
        self.average = None if ema_decay is None else WeightAverage(trained, ema_decay)

    def _set_sizes(self) -> None:
        num_envs = self.env.num_envs
        together = num_envs * self.processes.count
        sizes = {"samples_per_epoch": together, "batch_size": None, "micro_batch_size": num_envs, "group_size": 1}
        for name, default in sizes.items():
            given = getattr(self.settings, name)
            size = default or self.samples_per_epoch if given is None else given
            setattr(self, name, checked_integer(name, size, at_least=1))
        self.n_epochs = checked_integer("n_epochs", self.n_epochs, at_least=1)
        if self.samples_per_epoch % together:
            times = f" × {self.processes.count} processes" if self.processes.count > 1 else ""
            raise ValueError(
                f"samples_per_epoch must be a multiple of the environment's num_envs ({num_envs}){times}, "
                f"got {self.samples_per_epoch}{_SIZES}"
            )
        if self.samples_per_epoch % self.batch_size:
            raise ValueError(
                f"batch_size must divide samples_per_epoch ({self.samples_per_epoch}), got {self.batch_size}{_SIZES}"
            )
        if num_envs % self.group_size:
            raise ValueError(f"group_size must divide num_envs ({num_envs}), got {self.group_size}{_SIZES}")
        if self.settings.async_rewards and self.samples_per_epoch == together:
            warnings.warn(
                "async_rewards has no effect: it hides rewards behind the next images of a rollout, and all of these "
                f"({together}) are drawn at once; give a larger samples_per_epoch, or fewer num_envs",
                stacklevel=4,
            )

    def _check_fit(self) -> None:
        """Raise TypeError or ValueError if the policy cannot act in the environment, or be trained there."""
        check_fit(self.env, self.policy)

    # ------------------------------------------------------------------ what an algorithm has to provide
    @abstractmethod
    def train(self, rollout: Rollout) -> Metrics:
        """Update the policy from one rollout; return scalars to log, each a tensor on the device."""

    @property
    def behaviour(self) -> Policy:
        """The policy that rollouts are collected with: the one that is trained, unless an algorithm says otherwise."""
        return self.policy

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

        A run goes on to the total that it was planned for, with a schedule's learning rates too, by
        `learn(total - run.num_timesteps, reset_num_timesteps=False)`; see `Checkpoints`.

        An iteration, a rollout with its updates, that an error, Ctrl-C or a callback ends has not been: what it counted
        and learnt of rewards is forgotten, and half a gradient too. Only the updates that it has made stay made.

        Args:
            total_timesteps: Steps of all episodes together; the last rollout is finished.
            callback: SB3 callbacks, or a function of (locals, globals). From `on_rollout_end` on, `locals["returns"]`
                are the rollout's rewards, [B]. Those that count episodes by `locals["dones"]`, such as
                `StopTrainingOnMaxEpisodes`, do not apply: a rollout is of whole episodes.
            log_interval: Rollouts between two entries in the log; 0: none.
            tb_log_name: The run's name in TensorBoard; None: the algorithm's.
            reset_num_timesteps: Count from 0, let callbacks begin anew, and log into a new folder; False goes on with
                the counts (after `load`) and in the run's own folder, and `total_timesteps` are taken on top.
            progress_bar: Show one.

        Raises:
            ValueError: a number is none.
        """
        total_timesteps = checked_integer("total_timesteps", total_timesteps)
        log_interval = checked_integer("log_interval", log_interval or 0, at_least=0)
        if reset_num_timesteps:
            self.num_timesteps = 0
            self.callback_states = {}
            self._mark_boundary()
        else:
            total_timesteps += self.num_timesteps
        self._start_log(tb_log_name, anew=reset_num_timesteps)
        callbacks = self._callbacks(callback, progress_bar and self.processes.is_main)
        callbacks.init_callback(self)  # type: ignore[arg-type]
        callbacks.on_training_start(locals(), globals())
        if log_interval and self.processes.is_main:
            record_hyperparameters(self.logger, self._described(), policy=self.policy, env=self.env.unwrapped)  # type: ignore[arg-type]
        stopwatch = Stopwatch(self.env.unwrapped, self.num_timesteps)  # type: ignore[arg-type]
        while self.num_timesteps < total_timesteps:
            if not self._iterate(callbacks, total_timesteps, stopwatch, log_interval):
                break
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
            observation: Of the vector environment (tensors, [num_envs, …]), of the single one, or of SB3's VecEnv of
                single ones (numpy, [num_envs, …]); the actions are of the same kind.
            state: Ignored; there for SB3's `evaluate_policy` and the like.
            episode_start: Ignored, likewise.
            deterministic: Take the distribution's mode.
        """
        if all(isinstance(value, Tensor) for value in observation.values()):
            return self.policy.act(observation, deterministic=deterministic), None  # type: ignore[arg-type]
        spaces = self.env.single_observation_space
        alone = all(np.shape(value) == spaces[key].shape for key, value in observation.items())  # type: ignore[index]
        tensors = {key: torch.as_tensor(value).to(self.policy.device) for key, value in observation.items()}
        batch = {key: value[None] for key, value in tensors.items()} if alone else tensors
        actions = self.policy.act(batch, deterministic=deterministic).float().cpu().numpy()
        return actions[0] if alone else actions, None

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[Policy]:
        """Give the policy its averaged weights within the block, for evaluation or `policy.save`; return the policy.

        Raises:
            RuntimeError: there is no average: `ema_decay` is None.
        """
        if self.average is None:
            raise RuntimeError("there are no averaged weights: make the algorithm with ema_decay, for instance 0.99")
        with self.average.applied():
            yield self.policy

    # ------------------------------------------------------------------ its parts
    def _callbacks(self, callback: MaybeCallback, progress_bar: bool) -> BaseCallback:
        if isinstance(callback, Sequence):
            callback = CallbackList(list(callback))
        elif callback is None:
            callback = CallbackList([])
        elif not isinstance(callback, BaseCallback):
            callback = ConvertCallback(callback)
        return CallbackList([callback, _ProgressBar()]) if progress_bar else callback

    def _start_log(self, given: str | None, *, anew: bool) -> None:
        """Make the logger of a `learn`, unless the user has given one, or that of the last one goes on."""
        if self._has_own_logger:
            return
        folder = None
        if anew:
            self.log_identity = new_identity()
        if self.settings.tensorboard_log is not None and self.processes.is_main:
            name = given or type(self).__name__
            folder = own_folder(self.settings.tensorboard_log, self.log_identity, name=name, given=given is not None)
            if self.logger.dir == str(folder):
                return
        self.logger.close()
        self.logger = RunLogger(
            folder,
            printed=bool(self.settings.verbose) and self.processes.is_main,
            x=(lambda: self.reward_queries) if self.settings.log_x_axis == "reward_queries" else None,
        )

    def _iterate(self, callbacks: BaseCallback, total_timesteps: int, stopwatch: Stopwatch, log_interval: int) -> bool:
        """Collect a rollout and learn from it; return whether no callback has ended the training."""
        learnt = False
        extra = self._extra_state()
        self.guard.clear(self.optimizer)
        stopwatch.start_rollout()
        try:
            rollout = self._collect(callbacks)
            if rollout is not None:
                self._progress_remaining = max(0.0, 1 - self.num_timesteps / total_timesteps)
                stopwatch.start_update()
                metrics = {**self._train(rollout), **self.guard.counts()}
                learnt = True
        finally:
            if not learnt:
                self._take_back(extra)
        if rollout is None:
            return False
        self.iteration += 1
        self._mark_boundary()
        if log_interval and self.iteration % log_interval == 0 and self.processes.is_main:
            self._report(rollout, metrics, stopwatch)
        return True

    def _take_back(self, extra: dict[str, Any]) -> None:
        """Forget what an iteration that is not finished counted, remembered of rewards, and left of a gradient."""
        self.guard.clear(self.optimizer)
        self.num_timesteps, self.reward_queries = (
            self._at_boundary["num_timesteps"],
            self._at_boundary["reward_queries"],
        )
        self.env.unwrapped.reward.load_state_dict(self._reward_at_boundary)  # type: ignore[attr-defined]
        self._load_extra_state(extra)

    def _train(self, rollout: Rollout) -> Metrics:
        """Call `train`, and warn where it goes around `optimizer_step`."""
        steps, updates = self._steps_taken, self.num_updates
        metrics = self.train(rollout)
        around = self._steps_taken - steps - (self.num_updates - updates)
        if around > 0:
            warnings.warn(
                f"{type(self).__name__}.train stepped the optimizer itself ({around} times): such updates are neither "
                "checked for NaN nor clipped, counted, averaged or shared with other processes. Call "
                "self.backward(loss) and self.optimizer_step() in the place of loss.backward() and optimizer.step()",
                stacklevel=2,
            )
        return metrics

    def _count_step(self, *_: object) -> None:
        self._steps_taken += 1

    def _collect(self, callbacks: BaseCallback) -> Rollout | None:
        """Return the next rollout, or None when a callback ends the training."""
        before, taken = self.num_timesteps, 0

        def after_step(lanes: int) -> bool:
            nonlocal taken
            taken += lanes
            self.num_timesteps = before + taken * self.processes.count
            callbacks.update_locals({"self": self})
            return callbacks.on_step()

        callbacks.on_rollout_start()
        starts = self._starts()
        batches = [range(first, first + self.env.num_envs) for first in self._episodes()[:: self.env.num_envs]]
        resets = [starts.reset(self.iteration, batch) for batch in batches]
        rollout = collect(
            self.env,
            self.behaviour,
            seeds=[seeds for seeds, _ in resets],
            options=[options for _, options in resets],
            generators=[[self._policy_generator(episode) for episode in batch] for batch in batches],
            reduction=self.log_prob_reduction,
            after_step=after_step,
            max_images=self.settings.log_images,
            storage=self.storage,
            async_rewards=self.settings.async_rewards,
            keep=self.keep,
        )
        stopped, taken = self.processes.totals(rollout is None, taken)
        self.num_timesteps = before + taken
        if stopped:
            return None
        assert rollout is not None
        rollout = gathered(rollout, self.processes)
        if not rollout.valid.any():
            raise ValueError(f"none of the {rollout.num_episodes} rewards of the rollout is a finite number")
        self.reward_queries += rollout.num_episodes
        callbacks.update_locals({"returns": rollout.returns})
        callbacks.on_rollout_end()
        return rollout

    def _starts(self) -> Starts:
        """Return where the episodes begin."""
        return Starts(
            prompts=self.env.unwrapped.prompts,  # type: ignore[attr-defined]
            seed=self.seed,
            num_episodes=self.samples_per_epoch,
            rollouts=Rollouts(group_size=self.group_size, prompt_sampling=self.settings.prompt_sampling),
        )

    def _episodes(self) -> range:
        """Return which of a rollout's episodes this process draws."""
        return self.processes.share(self.samples_per_epoch)

    def _policy_generator(self, episode: int) -> torch.Generator:
        """Return where the policy's draws of an episode of this iteration come from."""
        return derived_generator(self.seed, _POLICY_STREAM, self.iteration, episode)

    def _update_generator(self, *key: int) -> np.random.Generator:
        """Return the generator of this iteration's shuffles, or of a part of it."""
        return np.random.default_rng(derived_seed(self.seed, _UPDATE_STREAM, self.iteration, *key))

    def _shuffled(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return episodes in a random order that deals them out evenly over the updates of a pass.

        Each update has one of every few episodes side by side, so that it has as many of each process as of any other.
        """
        order = rng.permutation(rows)
        blocks = order // (self.samples_per_epoch // self.batch_size)
        turns = np.empty_like(order)
        for block in np.unique(blocks):
            turns[blocks == block] = np.arange((blocks == block).sum())
        return order[np.argsort(turns, kind="stable")]

    def _current_learning_rate(self) -> float:
        rate = self._learning_rate
        warm = min(1.0, (self.num_updates + 1) / max(1, self.settings.warmup_updates))
        return warm * checked_number(
            "learning_rate", float(rate(self._progress_remaining) if callable(rate) else rate), "[0, inf)"
        )

    @final
    def backward(self, loss: Tensor) -> None:
        """Accumulate a loss's gradient: every backward pass of every algorithm."""
        self.guard.backward(loss)

    @final
    def optimizer_step(self) -> Tensor:
        """Apply the gradient that all processes accumulated if it is finite; return its norm before clipping.

        Raises:
            FloatingPointError: it is not, and `on_nonfinite` is "raise".
        """
        parameters = self.optimizer.param_groups[0]["params"]
        self.processes.sum_gradients(parameters)
        self.guard.agree(self.processes)
        self.guard.unscale(self.optimizer)
        max_norm = self.settings.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._current_learning_rate()
        where = f"iteration {self.iteration}, after {self.num_updates} updates"
        if self.guard.step(self.optimizer, norm, where=where):
            self.num_updates += 1
            if self.average is not None:
                self.average.update()
        return norm

    def _described(self) -> dict[str, object]:
        """Return what TensorBoard shows as the run's hyperparameters."""
        rate = self._learning_rate
        return {
            "algorithm": type(self).__name__,
            "learning_rate": f"{rate(1.0):g}, scheduled" if callable(rate) else rate,
            "seed": self.seed,
            **self._hyperparameters,
        }

    def _report(self, rollout: Rollout, metrics: Metrics, stopwatch: Stopwatch) -> None:
        """Write a rollout and its updates into the log."""
        counters = {"train/learning_rate": self.optimizer.param_groups[0]["lr"], "train/n_updates": self.num_updates}
        report(
            self.logger,
            rollout,
            metrics,
            env=self.env.unwrapped,  # type: ignore[arg-type]
            stopwatch=stopwatch,
            num_timesteps=self.num_timesteps,
            counters=counters,
        )
        self.dump_logs()

    def dump_logs(self) -> None:
        """Write what was recorded, and the counts, into the log, where the run is on its x-axis (SB3's name)."""
        self.logger.record("time/iterations", self.iteration)
        self.logger.record("time/total_timesteps", self.num_timesteps)
        self.logger.record("time/reward_queries", self.reward_queries)
        if self.evaluation_queries:
            self.logger.record("time/evaluation_queries", self.evaluation_queries)
        self.logger.dump(step=self.num_timesteps if self.settings.log_x_axis == "timesteps" else self.reward_queries)
