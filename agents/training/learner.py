"""What learners from data share: they train a copy of a model's denoiser, in the manners of `Algorithm`.

There is no environment and no reward; callbacks, logs, optimizers, averages of weights, checkpoints and processes are
those of the algorithms.
"""

import contextlib
import dataclasses
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn

from diffusion_gym.checks import checked_integer, checked_number
from diffusion_gym.models.base import Conditioning, DiffusionModel, Prediction
from diffusion_gym.parts import Part, described, flattened, is_written
from diffusion_gym.precision import has_fast_bf16
from diffusion_gym.samplers import Sampler
from diffusion_gym.transitions import draw_noise, transition

from ..experience.seeding import Stream, derived_generator, derived_seed
from ..logs.diagnostics import Metrics, mean_of
from ..logs.reports import read_numbers, record_settings
from ..logs.run_log import RunLogger, new_identity, own_folder
from ..policies.adaptation import Adaptation, Full
from ..runs.files import replaced_folder
from ..runs.learner_saving import save_learner
from ..updates.distributed import Processes
from ..updates.optimizers import AdamW, Optimizer
from ..updates.updates import Updates
from .documentation import with_inherited_arguments
from .sb3_callbacks import MaybeCallback, as_callback

LearnerPrecision = Literal["auto", "bf16"]
Self = TypeVar("Self", bound="Learner")

_SAVED_APART = ("model", "tensorboard_log", "verbose", "seed")


@dataclass(frozen=True)
class Cosine(Part):
    """A learning rate that falls by half a cosine.

        end·peak + (1 − end)·peak·(1 + cos(π·(1 − remaining)))/2

    Args:
        peak: The first, positive.
        end: The last as a share of it, in [0, 1].

    Raises:
        ValueError: a number is out of its range.
    """

    peak: float
    end: float = 0.02

    def __post_init__(self) -> None:
        checked_number("peak", self.peak, "(0, inf)")
        checked_number("end", self.end, "[0, 1]")

    def __call__(self, remaining: float) -> float:
        """Return the learning rate where this share of the training remains, 1 … 0."""
        return self.peak * (self.end + (1 - self.end) * (1 + math.cos(math.pi * (1 - remaining))) / 2)


@dataclass(eq=False, repr=False)
class Learner(ABC):
    """A learner that trains a copy of a model's denoiser on data.

    Every random number of a run is a function of `seed` and the update, so a loaded run goes on exactly where it was
    saved. Launched by accelerate, many processes compute a share of each batch.

    A subclass is a dataclass too, `@dataclass(kw_only=True, eq=False, repr=False)`: its fields are its keywords, and
    `save` writes them, but for those with `metadata=GIVEN_AGAIN`. It gives `losses`.

    Args:
        model: The diffusion model whose denoiser is the start; it is never changed.
        adaptation: What is trained of the denoiser: `Full()`, `Only(…)` or `LoRA(…)`.
        learning_rate: A number, `Cosine(peak)`, or a function of the remaining progress (1 … 0).
        batch_size: Images of an update, of all processes together.
        optimizer: `AdamW(…)` or `Muon(…)`, with what belongs to its steps: warm-up, clipping, averaging.
        precision: Of the networks' arithmetic, by autocast: "bf16", None for that of the weights, or "auto" for "bf16"
            where the device has instructions for it. Weights and losses are float32.
        tensorboard_log: The folder for TensorBoard; None: no such log.
        verbose: 1 prints the log's table.
        seed: Of everything that is drawn; None: one is drawn.

    Attributes:
        network: What is trained.
        updates: The optimizer, its gradient checks, and the average of the weights.
        num_timesteps: Images so far (SB3's name).
        iteration: Updates so far.
        run_seed: The seed, also where none was given.
        logger: SB3's logger.
        processes: The processes that train together.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its range.
    """

    model: DiffusionModel
    _: KW_ONLY
    adaptation: Adaptation = Full()
    learning_rate: float | Callable[[float], float] = 1e-4
    batch_size: int = 64
    optimizer: Optimizer = AdamW(weight_decay=0.0, betas=(0.9, 0.99), ema_decay=0.99)
    precision: LearnerPrecision | None = "auto"
    tensorboard_log: str | None = None
    verbose: int = 0
    seed: int | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__doc__ = with_inherited_arguments(cls.__doc__ or f"{cls.__name__}.", cls.__mro__[1].__doc__ or "")

    def __post_init__(self) -> None:
        for name, kind in (("model", DiffusionModel), ("adaptation", Adaptation), ("optimizer", Optimizer)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r:.200}")
        if self.precision not in (None, "auto", "bf16"):
            raise ValueError(f'precision must be None, "auto" or "bf16", got {self.precision!r}')
        if not callable(self.learning_rate):
            checked_number("learning_rate", self.learning_rate, "[0, inf)")
        self.batch_size = checked_integer("batch_size", self.batch_size, at_least=1)
        self.adaptation = self.adaptation.resolved(self.model)
        self.processes = Processes()
        drawn = derived_seed(time.time_ns()) if self.seed is None else checked_integer("seed", self.seed, at_least=0)
        self.seed = self.run_seed = self.processes.from_main(drawn)
        self.is_bf16 = self.precision == "bf16" or (self.precision == "auto" and has_fast_bf16(self.model.device))
        self.network = self.new_network()
        trained = self.trained_of(self.network)
        if not trained:
            raise ValueError(f"{self.adaptation!r} leaves nothing to train")
        self.processes.join(trained)
        self.num_timesteps = self.iteration = 0
        self.callback_states: dict[str, Any] = {}
        self._remaining = 1.0
        self._has_own_logger = False
        self.logger = Logger(None, [])
        self.log_identity = new_identity()
        self.updates = Updates(
            trained,
            self.optimizer,
            learning_rate=self._scheduled_learning_rate,
            processes=self.processes,
            scale_losses=False,
            where=lambda: f"update {self.iteration}",
        )

    @abstractmethod
    def losses(self, rows: range, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """Return the losses of images of this update's batch, with gradients, and scalars to log.

        Args:
            rows: The images of the batch that this process computes.
            generator: The randomness of the whole batch, the same in every process.

        Returns:
            [len(rows)] losses, and scalars.
        """

    def after_update(self) -> None:
        """Do what follows an update."""

    def networks(self) -> Mapping[str, nn.Module]:
        """Return further networks whose trained weights a checkpoint holds, by the name of their folder."""
        return {}

    def new_network(self) -> nn.Module:
        """Return a network that starts as the model's denoiser, in eval mode."""
        network = self.adaptation.network(self.model, torch.Generator().manual_seed(self.run_seed)).eval()
        self.model.use_training_attention(network, bf16=self.is_bf16)
        return network

    @staticmethod
    def trained_of(network: nn.Module) -> list[nn.Parameter]:
        """Return a network's weights that are trained."""
        return [parameter for parameter in network.parameters() if parameter.requires_grad]

    @property
    def progress(self) -> float:
        """The share of the training that is over, in [0, 1]."""
        return 1 - self._remaining

    @property
    def num_updates(self) -> int:
        """Optimizer steps so far."""
        return self.updates.num_updates

    def predict(
        self,
        x: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        *,
        guidance_scale: float,
        network: nn.Module | None = None,
        model: DiffusionModel | None = None,
    ) -> Prediction:
        """Return a network's prediction, in the learner's precision.

        Args:
            x: [B, ...] x_t.
            t: [B] the times.
            conditioning: [B, ...] each.
            guidance_scale: w.
            network: None: the one that is trained; with `model`, its frozen one.
            model: None: the learner's.
        """
        asked = self.network if network is None and model is None else network
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.is_bf16):
            return (model or self.model).denoise(x, t, conditioning, guidance_scale=guidance_scale, denoiser=asked)

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        *,
        num_steps: int,
        seeds: Sequence[int],
        guidance_scale: float | None = None,
        sampler: Sampler | None = None,
    ) -> Tensor:
        """Return images [B, 3, H, W] in [0, 1] of the averaged weights, or of the present ones where none are kept.

        Args:
            prompts: [B] texts.
            num_steps: Passes of the network.
            seeds: [B] of the noises.
            guidance_scale: None: the model's default.
            sampler: None: the model's.
        """
        model, scale = self.model, self.model.guidance_scale_of(guidance_scale)
        sampler = model.default_sampler if sampler is None else sampler
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        conditioning = model.encode_prompts(prompts)
        x = draw_noise(torch.empty(len(prompts), *model.latent_shape, device=model.device), generators)
        x = model.schedule.initial_std * x
        times = model.schedule.timesteps(num_steps).float().to(model.device)
        with self.averaged_weights():
            for t, s in pairwise(times.expand(len(x), -1).unbind(1)):
                prediction = self.predict(x, t, conditioning, guidance_scale=scale)
                x = transition(prediction.x0, prediction.epsilon, sampler.scales(model.schedule, t, s)).sample(
                    generators
                )
        return model.decode(x)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Give the network the averaged weights within the block, if there are any."""
        if self.updates.average is None or self.updates.average.is_applied or not self.iteration:
            yield
        else:
            with self.updates.average.applied():
                yield

    def learn(
        self: Self,
        total_images: int,
        callback: MaybeCallback = None,
        log_interval: int = 20,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train until `total_images` have been seen.

        A run goes on to the total that it was planned for by `learn(total - run.num_timesteps,
        reset_num_timesteps=False)`; see `Checkpoints`.

        Args:
            total_images: Images of all updates together; the last one is whole.
            callback: SB3 callbacks, or a function of (locals, globals). Each update is a "rollout" and a step of SB3's.
            log_interval: Updates between two entries in the log, which are means over them; 0: none.
            tb_log_name: The run's name in TensorBoard; None: the learner's.
            reset_num_timesteps: Count from 0 and log into a new folder; False goes on, and `total_images` are on top.
            progress_bar: Show one, of images.

        Raises:
            ValueError: `total_images` or `log_interval` is no whole number.
        """
        total_images = checked_integer("total_images", total_images)
        log_interval = checked_integer("log_interval", log_interval, at_least=0)
        if reset_num_timesteps:
            self.num_timesteps = self.iteration = 0
            self.callback_states = {}
        else:
            total_images += self.num_timesteps
        total_timesteps = total_images  # SB3's progress bar looks for it among the locals
        self._start_log(tb_log_name, is_new=reset_num_timesteps)
        callbacks = as_callback(callback, progress_bar=progress_bar and self.processes.is_main)
        callbacks.init_callback(self)  # type: ignore[arg-type]
        callbacks.on_training_start(locals(), globals())
        if log_interval and self.processes.is_main:
            record_settings(self.logger, self._described(), metric="train/loss")
        self._fit(callbacks, total_images, log_interval)
        callbacks.on_training_end()
        return self

    def _fit(self, callbacks: BaseCallback, total_images: int, log_interval: int) -> None:
        seen: list[Metrics] = []
        started, first = time.monotonic(), self.num_timesteps
        while self.num_timesteps < total_images:
            self._remaining = max(0.0, 1 - self.num_timesteps / total_images)
            callbacks.on_rollout_start()
            seen.append(self._update())
            self.num_timesteps += self.batch_size
            self.iteration += 1
            callbacks.update_locals({"self": self})
            goes_on = callbacks.on_step()
            callbacks.on_rollout_end()
            if log_interval and len(seen) == log_interval:
                self._report(mean_of(seen), (self.num_timesteps - first) / (time.monotonic() - started))
                seen = []
            if self.processes.totals(int(not goes_on))[0]:
                return

    def _update(self) -> Metrics:
        """Make one update; an error leaves the weights and the counts as they were."""
        self.updates.clear()
        generator = derived_generator(self.run_seed, Stream.UPDATES, self.iteration)
        losses, metrics = self.losses(self.processes.share(self.batch_size), generator)
        loss = losses.sum() / self.batch_size
        self.updates.backward(loss)
        norm = self.updates.apply()
        self.after_update()
        shares = {name: value * len(losses) / self.batch_size for name, value in metrics.items()}
        return {**self.processes.sums({"loss": loss.detach(), **shares}), "grad_norm": norm}

    def _report(self, metrics: Metrics, images_per_second: float) -> None:
        if not self.processes.is_main:
            return
        numbers = read_numbers({**metrics, **self.updates.guard.counts()})
        scalars = {
            **{f"train/{name}": float(value) for name, value in numbers.items()},
            "train/learning_rate": self.updates.optimizer.param_groups[0]["lr"],
            "train/n_updates": self.num_updates,
            "time/fps": images_per_second,
            "time/images": self.num_timesteps,
        }
        for name, value in scalars.items():
            self.logger.record(name, value)
        self.logger.dump(self.num_timesteps)

    def _scheduled_learning_rate(self) -> float:
        rate = self.learning_rate
        return checked_number("learning_rate", float(rate(self._remaining) if callable(rate) else rate), "[0, inf)")

    def _start_log(self, name: str | None, *, is_new: bool) -> None:
        """Make the logger of a `learn`, unless the user has given one, or that of the last one goes on."""
        if self._has_own_logger:
            return
        folder = None
        if is_new:
            self.log_identity = new_identity()
        if self.tensorboard_log is not None and self.processes.is_main:
            folder = own_folder(
                self.tensorboard_log, self.log_identity, name=name or type(self).__name__, given=name is not None
            )
            if self.logger.dir == str(folder):
                return
        self.logger.close()
        self.logger = RunLogger(folder, printed=bool(self.verbose) and self.processes.is_main)

    def set_logger(self, logger: Logger) -> None:
        """Log to this SB3 logger instead of the one that `learn` would make."""
        self.logger = logger
        self._has_own_logger = True

    def get_env(self) -> None:
        """Return None: there is no environment (asked for by SB3's callbacks)."""

    def hyperparameters(self) -> dict[str, Any]:
        """Return the keywords that a saved run keeps, as JSON can hold them; `load` gives them to the constructor."""
        written = [field for field in dataclasses.fields(self) if field.init and is_written(field.metadata)]
        return {
            field.name: described(getattr(self, field.name))
            for field in written
            if field.name not in _SAVED_APART
            and (field.name != "learning_rate" or isinstance(self.learning_rate, Part | float | int))
        }

    def _described(self) -> dict[str, object]:
        return {"algorithm": type(self).__name__, "seed": self.run_seed, **flattened(self.hyperparameters())}

    def save(self, path: str | Path) -> None:
        """Write the trained weights, and all else that is needed to go on, into a folder: see `save_learner`.

        Raises:
            FileExistsError: there is a file at `path`.
            OSError: the disk is full, or the like; an earlier checkpoint at `path` is still there.
            RuntimeError: the network has its averaged weights.
        """
        save_learner(self, path)

    def save_pipeline(self, folder: str | Path) -> Path:
        """Write what was trained, averaged if an average is kept, as diffusers opens it; return the folder.

        A whole network becomes a whole pipeline folder, in float32; LoRA layers a file for `load_lora_weights`.

        Raises:
            FileExistsError: there is something at `folder`.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder} is there: give a new folder")
        with replaced_folder(folder) as partial, self.averaged_weights():
            if self.adaptation.is_whole:
                left_out = shutil.ignore_patterns(self.model.denoiser_folder, "README.md")
                shutil.copytree(self.model.path, partial, dirs_exist_ok=True, ignore=left_out)
            self.adaptation.save(self.network, partial, model=self.model)
        return folder
