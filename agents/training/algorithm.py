"""What all algorithms share, in Stable-Baselines3's manners: learn, predict, save, load, callbacks, logger.

SB3's `BaseAlgorithm` itself wants a numpy VecEnv, finite action bounds and pickle, so it is not subclassed; its
callbacks, its logger and its scalar names are used as they are.
"""

import contextlib
import dataclasses
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from torch import Tensor

from diffusion_gym import transfer
from diffusion_gym.checks import checked_integer, checked_number
from diffusion_gym.parts import described, flattened, is_written
from diffusion_gym.transitions import Reduction

from ..experience.collection import collect
from ..experience.environment import check_fit, torch_env
from ..experience.rollouts import Keep, Rollout, Rollouts
from ..experience.seeding import Stream, derived_generator, derived_seed
from ..experience.starts import Starts
from ..logs.diagnostics import Metrics
from ..logs.reports import Stopwatch, record_hyperparameters, report
from ..logs.run_log import Log, RunLogger, new_identity, own_folder
from ..policies import Policy
from ..runs.saving import load_run, save_run
from ..updates.distributed import Processes, gathered
from ..updates.optimizers import AdamW, Optimizer
from ..updates.updates import Updates
from .documentation import with_inherited_arguments
from .sb3_callbacks import MaybeCallback, as_callback
from .sizes import Sizes

LearningRate = float | Callable[[float], float]
Self = TypeVar("Self", bound="Algorithm")

_SAVED_APART = ("policy", "env", "learning_rate", "tensorboard_log", "verbose", "seed")


@dataclass(eq=False, repr=False)
class Algorithm(ABC):
    """An algorithm that trains a policy: collect whole episodes, update, log, repeat.

    Every random number of a run is a function of `seed` and the iteration, so a loaded run goes on exactly where it
    was saved.

    A subclass is a dataclass too, `@dataclass(kw_only=True, eq=False, repr=False)`: its fields are its keywords, with
    their defaults, and `save` writes them. It gives `train`, which calls `self.updates.backward(loss)` and
    `self.updates.apply()` in the place of torch's: so gradients are scaled, checked, clipped and summed over processes,
    and updates are counted and averaged. Its `__post_init__` checks its own fields, then calls
    `super().__post_init__()`, then makes what else it needs.

    In an environment with on_invalid_reward="nan", episodes whose reward is NaN or infinite are left out of advantages,
    losses and statistics, and counted as `rollout/invalid_rewards`; else such a reward raises.

    Launched by accelerate, many processes train one policy, each with an environment of its own (see
    `agents.updates.distributed`). Callbacks run in all of them; when one ends the training, all stop after the rollout.
    Logs and saved folders are written by the main process.

    Args:
        policy: What is trained.
        env: A torch vector environment; where episodes differ in length, with autoreset_mode "DISABLED".
        learning_rate: The optimizer's, or a function of the remaining progress (1 … 0).
        batch_size: Images per optimizer step, of all processes together, a divisor of the rollout's; None: all of the
            rollout. (ddpo-pytorch: `train.batch_size` × `train.gradient_accumulation_steps`.)
        n_epochs: Passes over a rollout.
        optimizer: `AdamW(…)` or `Muon(…)`, with what belongs to its steps: warm-up, clipping, averaging.
        rollouts: How many images are drawn before each round of updates, from which prompts, and how they are kept.
        log: What is logged beside scalars, and over which x-axis.
        tensorboard_log: The folder for TensorBoard; None: no such log.
        verbose: 1 prints the log's table.
        seed: Of everything that is drawn in training; None: one is drawn.

    Attributes:
        sizes: How many episodes a rollout, an update, a pass and a group have.
        run_seed: The seed, also where none was given.
        updates: The optimizer, its gradient checks, and the average of the weights.
        num_timesteps: Environment steps so far, over all lanes.
        iteration: Rollouts learnt from so far.
        reward_queries: Images of the training rewarded so far.
        evaluation_queries: Images that callbacks had rewarded besides, to judge the policy; they add what they ask for.
        callback_states: What callbacks keep in checkpoints, each under a name of its own, as JSON can hold it.
        logger: SB3's logger.
        processes: The processes that train together.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its range, the sizes do not divide each other,
            or the policy does not fit the environment.
    """

    policy: Policy
    env: VectorEnv
    _: KW_ONLY
    learning_rate: LearningRate = 1e-5
    batch_size: int | None = None
    n_epochs: int = 1
    optimizer: Optimizer = AdamW()
    rollouts: Rollouts = Rollouts()
    log: Log = Log()
    tensorboard_log: str | None = None
    verbose: int = 0
    seed: int | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__doc__ = with_inherited_arguments(cls.__doc__ or f"{cls.__name__}.", cls.__mro__[1].__doc__ or "")

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise TypeError(
                f"policy must be a Policy, such as DenoisingPolicy(env.unwrapped.model); got {self.policy!r}"
            )
        self.base_env = torch_env(self.env)
        self.processes = Processes()
        self._check_parts()
        self.check_fit()
        self.n_epochs = checked_integer("n_epochs", self.n_epochs, at_least=1)
        self.sizes = Sizes.resolved(
            self.rollouts, self.batch_size, num_envs=self.env.num_envs, num_processes=self.processes.count
        )
        self.storage = self.rollouts.storage()
        self.storage.check(self.base_env)
        self._draw_seed()
        self.num_timesteps = self.iteration = self.reward_queries = self.evaluation_queries = 0
        self.callback_states: dict[str, Any] = {}
        self.mark_boundary()
        self._check_prompt_weights()
        self._check_reward()
        self._progress_remaining = 1.0
        self._has_own_logger = False
        self.logger = Logger(None, [])
        self.log_identity = new_identity()
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError(f"{type(self.policy).__name__} has nothing to train")
        self.processes.join(trained)
        self.updates = Updates(
            trained,
            self.optimizer,
            learning_rate=self._scheduled_learning_rate,
            processes=self.processes,
            scale_losses=self.policy.needs_loss_scaling,
            where=lambda: f"iteration {self.iteration}",
        )

    def _check_parts(self) -> None:
        parts = {"optimizer": (Optimizer, "AdamW"), "rollouts": (Rollouts, "Rollouts"), "log": (Log, "Log")}
        for name, (kind, example) in parts.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a part, such as {example}(…); got {getattr(self, name)!r}")
        checked_integer("verbose", self.verbose, at_least=0)
        if not callable(self.learning_rate):
            checked_number("learning_rate", self.learning_rate, "[0, inf)")

    def check_fit(self) -> None:
        """Raise TypeError or ValueError if the policy cannot act in the environment, or be trained there."""
        check_fit(self.env, self.policy)
        mode = self.base_env.autoreset_mode
        if self.base_env.num_steps is None and mode is not AutoresetMode.DISABLED:
            raise ValueError(
                "episodes differ in length here, and lanes that reset themselves would favour the short ones: make the "
                f'environment with autoreset_mode="DISABLED", got {mode.name}'
            )

    def _draw_seed(self) -> None:
        drawn = derived_seed(time.time_ns()) if self.seed is None else checked_integer("seed", self.seed, at_least=0)
        self.seed = self.run_seed = self.processes.from_main(drawn)

    def _check_prompt_weights(self) -> None:
        weights = self.base_env.prompts.weights or ()
        if self.rollouts.prompt_sampling == "round_robin" and len(set(weights)) > 1:
            warnings.warn(
                'prompt_sampling="round_robin" takes every prompt as often as any other: the weights that prompts have '
                'are not looked at; "random" does so',
                stacklevel=4,
            )

    def _check_reward(self) -> None:
        if self.processes.count > 1 and self.reward_at_boundary:
            raise ValueError(
                f"each process would have its own statistics of the reward {self.base_env.reward.name!r}: "
                "give them to it, Normalised(reward, mean=…, std=…)"
            )

    @abstractmethod
    def train(self, rollout: Rollout) -> Metrics:
        """Update the policy from one rollout; return scalars to log, each a tensor on the device."""

    @property
    def behaviour(self) -> Policy:
        """The policy that rollouts are collected with: the one that is trained, unless an algorithm says otherwise."""
        return self.policy

    @property
    def reduction(self) -> Reduction:
        """How log-probs are reduced over an action's dimensions."""
        return "sum"

    @property
    def keep(self) -> Keep:
        """What of a rollout `train` looks at: see `collect`."""
        return "steps"

    @property
    def num_updates(self) -> int:
        """Optimizer steps so far."""
        return self.updates.num_updates

    def state(self) -> dict[str, Any]:
        """Return a copy of what a resumed run needs beside weights, optimizer and counts, as JSON can hold it.

        An iteration that is interrupted is taken back by it too. A subclass adds to what `super().state()` returns.
        """
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the tensors that a resumed run needs beside those of `state`, weights and optimizer."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` returned."""

    def saved_policies(self) -> Mapping[str, Policy]:
        """Return the policies that a checkpoint holds beside the trained one, by the name of their folder."""
        return {}

    def hyperparameters(self) -> dict[str, Any]:
        """Return the keywords that a saved run keeps, as JSON can hold them; `load` gives them to the constructor."""
        written = [field for field in dataclasses.fields(self) if field.init and is_written(field.metadata)]
        return {field.name: described(getattr(self, field.name)) for field in written if field.name not in _SAVED_APART}

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

        Where an error, Ctrl-C or a callback interrupts an iteration, a rollout with its updates, the counts, what the
        reward learnt and half a gradient are taken back; the updates that were made stay.

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
            ValueError: `total_timesteps` or `log_interval` is no whole number.
        """
        total_timesteps = checked_integer("total_timesteps", total_timesteps)
        log_interval = checked_integer("log_interval", log_interval or 0, at_least=0)
        if reset_num_timesteps:
            self.num_timesteps = 0
            self.callback_states = {}
            self.mark_boundary()
        else:
            total_timesteps += self.num_timesteps
        self._start_log(tb_log_name, is_new=reset_num_timesteps)
        callbacks = as_callback(callback, progress_bar=progress_bar and self.processes.is_main)
        callbacks.init_callback(self)  # type: ignore[arg-type]
        callbacks.on_training_start(locals(), globals())
        if log_interval and self.processes.is_main:
            record_hyperparameters(self.logger, self._described(), policy=self.policy, env=self.base_env)
        stopwatch = Stopwatch(self.base_env, self.num_timesteps)
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
        actions = transfer.to_host(self.policy.act(batch, deterministic=deterministic).float())
        return actions[0] if alone else actions, None

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[Policy]:
        """Give the policy its averaged weights within the block, for evaluation or `policy.save`; return the policy.

        Raises:
            RuntimeError: there is no average: the optimizer's `ema_decay` is None.
        """
        if self.updates.average is None:
            raise RuntimeError("there are no averaged weights: give the algorithm optimizer=AdamW(ema_decay=0.99)")
        with self.updates.average.applied():
            yield self.policy

    def _start_log(self, name: str | None, *, is_new: bool) -> None:
        """Make the logger of a `learn`, unless the user has given one, or that of the last one goes on."""
        if self._has_own_logger:
            return
        folder = None
        if is_new:
            self.log_identity = new_identity()
        if self.tensorboard_log is not None and self.processes.is_main:
            is_named = name is not None
            folder = own_folder(
                self.tensorboard_log, self.log_identity, name=name or type(self).__name__, given=is_named
            )
            if self.logger.dir == str(folder):
                return
        self.logger.close()
        self.logger = RunLogger(
            folder,
            printed=bool(self.verbose) and self.processes.is_main,
            x=(lambda: self.reward_queries) if self.log.x_axis == "reward_queries" else None,
        )

    def _iterate(self, callbacks: BaseCallback, total_timesteps: int, stopwatch: Stopwatch, log_interval: int) -> bool:
        """Collect a rollout and learn from it; return whether no callback has ended the training."""
        learnt = False
        state, tensors = self.state(), self.tensors()
        self.updates.clear()
        stopwatch.start_rollout()
        try:
            rollout = self._collect(callbacks)
            if rollout is not None:
                self._progress_remaining = max(0.0, 1 - self.num_timesteps / total_timesteps)
                stopwatch.start_update()
                metrics = {**self._train(rollout), **self.updates.guard.counts()}
                learnt = True
        finally:
            if not learnt:
                self._take_back(state, tensors)
        if rollout is None:
            return False
        self.iteration += 1
        self.mark_boundary()
        if log_interval and self.iteration % log_interval == 0 and self.processes.is_main:
            self._report(rollout, metrics, stopwatch)
        return True

    def _take_back(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Forget what an iteration that is not finished counted, remembered of rewards, and left of a gradient."""
        self.updates.clear()
        self.num_timesteps = self.counts_at_boundary["num_timesteps"]
        self.reward_queries = self.counts_at_boundary["reward_queries"]
        self.base_env.reward.load_state_dict(self.reward_at_boundary)
        self.load_state(state)
        self.load_tensors(tensors)

    def _train(self, rollout: Rollout) -> Metrics:
        """Call `train`, and warn where it goes around `updates.apply`."""
        before = self.updates.num_steps_around
        metrics = self.train(rollout)
        around = self.updates.num_steps_around - before
        if around > 0:
            warnings.warn(
                f"{type(self).__name__}.train stepped the optimizer itself ({around} times): such updates are neither "
                "checked for NaN nor clipped, counted, averaged or shared with other processes. Call "
                "self.updates.backward(loss) and self.updates.apply() in the place of loss.backward() and "
                "optimizer.step()",
                stacklevel=2,
            )
        return metrics

    def _collect(self, callbacks: BaseCallback) -> Rollout | None:
        """Return the next rollout, or None when a callback ends the training."""
        before, taken = self.num_timesteps, 0

        def after_step(lanes: int) -> bool:
            nonlocal taken
            taken += lanes
            self.num_timesteps = before + taken * self.processes.count
            callbacks.update_locals({"self": self})
            goes_on = callbacks.on_step()
            # Where weights are shared, nobody can go on drawing without the others.
            return self.processes.totals(not goes_on) == (0,) if self.processes.share_weights else goes_on

        callbacks.on_rollout_start()
        episodes = self.processes.share(self.sizes.samples)
        batches = [range(first, first + self.env.num_envs) for first in episodes[:: self.env.num_envs]]
        resets = [self.starts.reset(self.iteration, batch) for batch in batches]
        rollout = collect(
            self.env,
            self.behaviour,
            seeds=[seeds for seeds, _ in resets],
            options=[options for _, options in resets],
            generators=[[self._policy_generator(episode) for episode in batch] for batch in batches],
            reduction=self.reduction,
            after_step=after_step,
            max_images=self.log.images,
            storage=self.storage,
            async_rewards=self.rollouts.async_rewards,
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

    @property
    def starts(self) -> Starts:
        """The seeds and prompts with which the run's episodes begin."""
        return Starts(self.base_env.prompts, self.run_seed, num_episodes=self.sizes.samples, rollouts=self.rollouts)

    def _policy_generator(self, episode: int) -> torch.Generator:
        """Return the generator of the policy's draws in an episode of this iteration."""
        return derived_generator(self.run_seed, Stream.POLICY, self.iteration, episode)

    def update_generator(self, *key: int) -> np.random.Generator:
        """Return the generator of this iteration's shuffles, or of a part of it."""
        return np.random.default_rng(derived_seed(self.run_seed, Stream.UPDATES, self.iteration, *key))

    def shuffled(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return episodes in a random order of which each update of a pass has its share from all over the rollout.

        The rollout is cut into blocks of as many neighbours as a pass has updates, and each update gets one of every
        block: so it has as many episodes of each process as of any other, and few of one group.
        """
        order = rng.permutation(rows)
        blocks = order // (self.sizes.samples // self.sizes.batch)
        turns = np.empty_like(order)
        for block in np.unique(blocks):
            turns[blocks == block] = np.arange((blocks == block).sum())
        return order[np.argsort(turns, kind="stable")]

    def _scheduled_learning_rate(self) -> float:
        """Return the learning rate for the progress so far."""
        rate = self.learning_rate
        return checked_number(
            "learning_rate", float(rate(self._progress_remaining) if callable(rate) else rate), "[0, inf)"
        )

    def mark_boundary(self) -> None:
        """Note what a resumed run begins with: one that is saved within a rollout plays it again."""
        self.counts_at_boundary = {"num_timesteps": self.num_timesteps, "reward_queries": self.reward_queries}
        self.reward_at_boundary = self.base_env.reward.state_dict()

    def _described(self) -> dict[str, object]:
        """Return what TensorBoard shows as the run's hyperparameters."""
        rate = self.learning_rate
        return {
            "algorithm": type(self).__name__,
            "learning_rate": f"{rate(1.0):g}, scheduled" if callable(rate) else rate,
            "seed": self.run_seed,
            **flattened(self.hyperparameters()),
            **dataclasses.asdict(self.sizes),
        }

    def _report(self, rollout: Rollout, metrics: Metrics, stopwatch: Stopwatch) -> None:
        """Write a rollout and its updates into the log."""
        rate = self.updates.optimizer.param_groups[0]["lr"]
        counters = {"train/learning_rate": rate, "train/n_updates": self.num_updates}
        report(
            self.logger,
            rollout,
            metrics,
            env=self.base_env,
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
        self.logger.dump(step=self.num_timesteps if self.log.x_axis == "timesteps" else self.reward_queries)

    def save(self, path: str | Path) -> None:
        """Write the trained weights and all that is needed to go on, into a folder: see `agents.runs.saving.save_run`.

        Processes that share weights have to call it all.

        Raises:
            FileExistsError: there is a file at `path`.
            OSError: the disk is full, or the like; an earlier checkpoint at `path` is still there.
            TypeError: the constructor has arguments that are no fields, so that `load` could not give them again.
            RuntimeError: the policy has its averaged weights: `policy.save` writes these.
        """
        save_run(self, path)

    @classmethod
    def load(
        cls: type[Self],
        path: str | Path,
        env: VectorEnv,
        *,
        policy: Policy | None = None,
        reference: Policy | None = None,
        learning_rate: LearningRate | None = None,
        batch_size: int | None = None,
        rollouts: Rollouts | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 0,
    ) -> Self:
        """Return a saved run; `learn(total - run.num_timesteps, reset_num_timesteps=False)` continues it.

        Args:
            path: What `save` was given; or a folder of checkpoints, of which the newest whole one is taken, with a
                warning that names newer ones and what is wrong with them.
            env: The environment to go on in.
            policy: A policy of the saved one's shape, to read the weights into; None: one on the environment's model.
            reference: The policy that the run's KL divergence is to, if one was given to it: such a one is not saved.
            learning_rate: None: the saved one. A schedule (a callable) cannot be saved and is to be given again.
            batch_size: None: the saved one; another where the environment has other lanes.
            rollouts: Likewise.
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
        given = {"batch_size": batch_size, "rollouts": rollouts, "learning_rate": learning_rate}
        return load_run(
            cls,
            path,
            env,
            policy=policy,
            reference=reference,
            changed={name: value for name, value in given.items() if value is not None},
            tensorboard_log=tensorboard_log,
            verbose=verbose,
        )
