"""What every algorithm can be told, and the optimizer that it makes of it."""

from collections.abc import Callable
from typing import Literal, TypedDict

import torch

Schedule = Callable[[float], float]
OnNonfinite = Literal["raise", "skip"]
LogXAxis = Literal["timesteps", "reward_queries"]
RolloutDtype = Literal["float16", "bfloat16"]


class Options(TypedDict, total=False):
    """The keywords that every algorithm takes; see `Algorithm`."""

    learning_rate: float | Schedule
    samples_per_epoch: int | None
    batch_size: int | None
    group_size: int
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
    verbose: int
    seed: int | None


def adamw_class(*, use_8bit_adam: bool) -> type[torch.optim.AdamW]:
    """Return torch's AdamW, or bitsandbytes' with 8-bit states.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if not use_8bit_adam:
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit
