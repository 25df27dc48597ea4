"""What every algorithm can be told, and what is made of it."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from diffusion_gym.checks import checked_integer, checked_number

from ..experience.storage import Storage
from ..updates.optimizers import MuonWithAdamW, adamw_class

Schedule = Callable[[float], float]
OnNonfinite = Literal["raise", "skip"]
LogXAxis = Literal["timesteps", "reward_queries"]
RolloutDtype = Literal["float16", "bfloat16"]
PromptSampling = Literal["random", "round_robin"]
OptimizerName = Literal["adamw", "muon"]


def require_number(within: str, *, none: bool = False, **values: object) -> None:
    """Raise ValueError for arguments that are no finite numbers in an interval ("[0, 1)"), nor None if allowed."""
    for name, value in values.items():
        if not (none and value is None):
            checked_number(name, value, within)


def require_whole(at_least: int, *, none: bool = False, **values: object) -> None:
    """Raise ValueError for arguments that are no whole numbers of at least this, nor None if that is allowed."""
    for name, value in values.items():
        if not (none and value is None):
            checked_integer(name, value, at_least=at_least)


def require_used(needs: str, used: bool, **pairs: tuple[object, object]) -> None:
    """Raise ValueError for an argument that would have no effect.

    Args:
        needs: What would give it one.
        used: That is there.
        pairs: For each argument its value and its default.
    """
    for name, (value, default) in pairs.items():
        if not used and value != default:
            raise ValueError(f"{name}={value!r} has no effect: it needs {needs}")


class Options(TypedDict, total=False):
    """The keywords that every algorithm takes; see `Settings`."""

    optimizer: OptimizerName
    learning_rate: float | Schedule
    warmup_updates: int
    samples_per_epoch: int | None
    batch_size: int | None
    group_size: int
    prompt_sampling: PromptSampling
    async_rewards: bool
    micro_batch_size: int | None
    rollout_device: str | None
    rollout_dtype: RolloutDtype | None
    max_grad_norm: float | None
    adam_beta1: float
    adam_beta2: float
    adam_weight_decay: float
    adam_epsilon: float
    use_8bit_adam: bool
    ema_decay: float | None
    on_nonfinite: OnNonfinite
    tensorboard_log: str | None
    log_x_axis: LogXAxis
    log_images: int
    verbose: int
    seed: int | None


def require_known(algorithm: type, options: Iterable[str]) -> None:
    """Raise TypeError for keywords that no algorithm has, and list those of this one."""
    unknown = sorted(set(options) - Options.__annotations__.keys())
    if not unknown:
        return
    allowed: set[str] = set()
    for parameter in inspect.signature(algorithm).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            allowed.add(parameter.name)
        for options_of_it in get_args(parameter.annotation) if parameter.kind is parameter.VAR_KEYWORD else ():
            allowed |= options_of_it.__annotations__.keys()
    listed = ", ".join(repr(name) for name in sorted(allowed))
    raise TypeError(f"{algorithm.__name__} has no keyword {unknown[0]!r}: allowed are {listed}")


@dataclass(frozen=True)
class Settings:
    """What every algorithm can be told.

    Args:
        optimizer: "adamw", as published, or "muon" (`agents.updates.optimizers.MuonWithAdamW`), whose steps follow the
            gradient's noise less far; the learning rates of the two compare only roughly.
        learning_rate: The optimizer's, or a function of the remaining progress (1 … 0).
        warmup_updates: So many first updates have 1/n, 2/n … of the learning rate, for Adam knows little then of the
            gradient's size.
        samples_per_epoch: Images per rollout, of all processes together, a multiple of `env.num_envs` times their
            number; None: just that. (ddpo-pytorch: `sample.batch_size` × `sample.num_batches_per_epoch`.)
        batch_size: Images per optimizer step, of all processes together, a divisor of `samples_per_epoch`; None: all
            of them. (ddpo-pytorch: `train.batch_size` × `train.gradient_accumulation_steps`.)
        group_size: Images of one prompt that are drawn side by side, a divisor of `env.num_envs`; 1: each image's
            prompt is drawn for itself. Rewards differ more between prompts than among images of one prompt (kilobytes
            of the embedded model's: three times the variance), whose mean groups tell from the first rollout on.
        prompt_sampling: "random": the prompt of each image, or group, is drawn for itself, as the prompt set's weights
            say. "round_robin": all prompts in turn, in an order that is shuffled anew for every pass over them.
        async_rewards: Compute rewards in a thread while the next images of the rollout are drawn, where
            `samples_per_epoch` is several times `env.num_envs`: for rewards that are waited for, another machine's or
            another device's. The rollout is the same; `time/reward_seconds` is then the decoding, and the rest of the
            rollout what the rewards did not hide behind. Refused behind wrappers that have a `step`, for they see none.
            What ends a rollout early waits for the reward that is being computed: a thread cannot be stopped.
        micro_batch_size: Transitions per forward and backward pass of a process; None: `env.num_envs`. Only memory and
            speed depend on it; with the rollout's own batch size the ratio is exactly 1 before the first update.
        rollout_device: Where to keep the rollout's latents and features, such as "cpu"; None: on the policy's device.
        rollout_dtype: Keep them in "float16" or "bfloat16", see `agents.experience.storage.Storage`; None: as they are.
        max_grad_norm: The gradient is clipped to this norm; None: not at all.
        adam_beta1: AdamW's β₁; Muon's momentum too.
        adam_beta2: AdamW's β₂.
        adam_weight_decay: AdamW's weight decay, and Muon's.
        adam_epsilon: AdamW's ε.
        use_8bit_adam: bitsandbytes' 8-bit AdamW (needs a GPU and `pip install bitsandbytes`).
        ema_decay: Keep an average of the trained weights over the updates, see `WeightAverage`; None: none.
        on_nonfinite: What an update whose loss or gradient is NaN or infinite does, before it touches the weights:
            "raise", or "skip" with a warning, counted as `train/skipped_updates`. With a policy in fp16, gradients that
            overflow because of the loss scale are no such case: torch's `GradScaler` skips them and halves the scale
            (`train/overflowed_updates`).
        tensorboard_log: Folder for TensorBoard; None: no such log.
        log_x_axis: What TensorBoard draws over: environment steps, as in SB3, or images rewarded so far, by which
            algorithms of different step counts compare.
        log_images: Images of each logged rollout in TensorBoard, at most 256 pixels wide each; 0: none.
        verbose: 1 prints the log's table.
        seed: Of everything that is drawn in training; None: one is drawn.

    Raises:
        TypeError, ValueError: a value is of the wrong kind, or none of those that there are.
    """

    optimizer: OptimizerName = "adamw"
    learning_rate: float | Schedule = 1e-5
    warmup_updates: int = 0
    samples_per_epoch: int | None = None
    batch_size: int | None = None
    group_size: int = 1
    prompt_sampling: PromptSampling = "random"
    async_rewards: bool = False
    micro_batch_size: int | None = None
    rollout_device: str | None = None
    rollout_dtype: RolloutDtype | None = None
    max_grad_norm: float | None = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-4
    adam_epsilon: float = 1e-8
    use_8bit_adam: bool = False
    ema_decay: float | None = None
    on_nonfinite: OnNonfinite = "raise"
    tensorboard_log: str | None = None
    log_x_axis: LogXAxis = "timesteps"
    log_images: int = 16
    verbose: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        kinds = {
            "log_x_axis": LogXAxis,
            "rollout_dtype": RolloutDtype,
            "prompt_sampling": PromptSampling,
            "optimizer": OptimizerName,
        }
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                raise ValueError(f"{name} must be one of {get_args(kind)}, got {value!r}")
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise ValueError(f'use_8bit_adam goes with optimizer="adamw", got {self.optimizer!r}')
        require_whole(0, warmup_updates=self.warmup_updates, verbose=self.verbose, log_images=self.log_images)
        require_whole(0, none=True, seed=self.seed)
        require_whole(1, group_size=self.group_size)
        sizes = ("samples_per_epoch", "batch_size", "micro_batch_size")
        require_whole(1, none=True, **{name: getattr(self, name) for name in sizes})
        if not callable(self.learning_rate):
            require_number("[0, inf)", learning_rate=float(self.learning_rate))
        require_number("(0, inf)", none=True, max_grad_norm=self.max_grad_norm)
        require_number("[0, 1)", adam_beta1=self.adam_beta1, adam_beta2=self.adam_beta2)
        require_number("[0, inf)", adam_weight_decay=self.adam_weight_decay)
        require_number("(0, inf)", adam_epsilon=self.adam_epsilon)

    def hyperparameters(self) -> dict[str, Any]:
        """Return those that a saved run keeps as they are; `load` gives them to the constructor again."""
        apart = ("learning_rate", "tensorboard_log", "verbose", "seed")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in apart}

    def storage(self) -> Storage:
        """Return how rollouts are kept."""
        return Storage(
            None if self.rollout_device is None else torch.device(self.rollout_device),
            None if self.rollout_dtype is None else getattr(torch, self.rollout_dtype),
        )

    def make_optimizer(self, parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return the optimizer of some parameters.

        Raises:
            ImportError: bitsandbytes is missing, or torch is too old for Muon.
            ValueError: all parameters are Muon's, and AdamW's numbers have no effect.
        """
        parameters = list(parameters)
        if self.optimizer == "muon":
            require_used(
                "a weight that is no matrix, for Muon takes all of these",
                any(parameter.ndim < 2 for parameter in parameters),
                adam_beta2=(self.adam_beta2, 0.999),
                adam_epsilon=(self.adam_epsilon, 1e-8),
            )
            kind: Callable[..., torch.optim.Optimizer] = MuonWithAdamW
        else:
            kind = adamw_class(use_8bit_adam=self.use_8bit_adam)
        return kind(
            parameters,
            lr=learning_rate,
            betas=(self.adam_beta1, self.adam_beta2),
            weight_decay=self.adam_weight_decay,
            eps=self.adam_epsilon,
        )
