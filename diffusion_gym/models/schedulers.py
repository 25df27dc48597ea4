"""diffusers' scheduler folders as noise schedules."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffusers import LCMScheduler
from torch import Tensor

from ..predictions import PredictionType
from ..schedules import DiscreteVPSchedule, LatentConsistencySchedule
from .folders import read_config
from .understood import LCM_SCHEDULER, SCHEDULER, Values, check_values, keys_of, scheduler_class, warn_of_other_times

_Schedule = TypeVar("_Schedule", bound=DiscreteVPSchedule)


def discrete_schedule(
    folder: Path,
    *,
    class_name: object = None,
    steps_offset: int | None = None,
    understood: Mapping[str, Values] = SCHEDULER,
) -> tuple[DiscreteVPSchedule, PredictionType]:
    """Return the noise process of a diffusers scheduler folder, and the quantity that the denoiser predicts.

    Only its numbers are used (betas, spacing, offset, the last ᾱ), completed by the defaults of the scheduler's class;
    the class's own stepping is not (Stable Diffusion ships PNDM). The class decides whether
    the grid ends at the clean end: a `set_alpha_to_one` beside a class that does not read it has no effect.

    Args:
        folder: The folder of `scheduler_config.json`.
        class_name: The scheduler's class; None: the one that the file names.
        steps_offset: The offset that replaces the file's.
        understood: The values that are understood.

    Raises:
        FileNotFoundError, ValueError: the scheduler is not there, or none that is understood.
    """
    file = folder / "scheduler_config.json"
    name = read_config(file).get("_class_name", "DDIMScheduler") if class_name is None else class_name

    def make(alphas_cumprod: Tensor, values: Mapping[str, Any]) -> DiscreteVPSchedule:
        return DiscreteVPSchedule(
            alphas_cumprod,
            spacing=values.get("timestep_spacing", "linspace"),
            steps_offset=values.get("steps_offset", 0),
            ends_clean=values.get("set_alpha_to_one", True),
        )

    schedule, values = _process(
        file, scheduler_class(name, file), make, understood=understood, steps_offset=steps_offset
    )
    warn_of_other_times(str(name), schedule.spacing, file)
    return schedule, values["prediction_type"]


def consistency_schedule(folder: Path) -> tuple[LatentConsistencySchedule, PredictionType, float]:
    """Return the process of an `LCMScheduler` folder, what the denoiser predicts, and the times' factor in c_skip.

    Raises:
        FileNotFoundError, ValueError: the scheduler is not there, or holds something that is not understood.
    """

    def make(alphas_cumprod: Tensor, values: Mapping[str, Any]) -> LatentConsistencySchedule:
        return LatentConsistencySchedule(alphas_cumprod, original_steps=values["original_inference_steps"])

    file = folder / "scheduler_config.json"
    schedule, values = _process(file, LCMScheduler, make, understood=LCM_SCHEDULER)
    return schedule, values["prediction_type"], float(values["timestep_scaling"])


def _process(
    file: Path,
    scheduler: type,
    make: Callable[[Tensor, Mapping[str, Any]], _Schedule],
    *,
    understood: Mapping[str, Values],
    steps_offset: int | None = None,
) -> tuple[_Schedule, dict[str, Any]]:
    """Return the noise process of a scheduler's file, and the file's values, completed by the class's defaults."""
    config = read_config(file)
    written = config.get("_class_name", scheduler.__name__)
    if written != scheduler.__name__:
        warnings.warn(
            f"{file}: _class_name is {written!r}, model_index.json beside it says {scheduler.__name__!r}, which is "
            "what diffusers' pipeline takes, and this package: make them one",
            stacklevel=3,
        )
    check_values(config, scheduler, understood, file)
    defaults = keys_of(scheduler)
    ignored_keys = {key for key, known in understood.items() if not known.is_refused}  # the folder's own walk
    values: dict[str, Any] = {
        **defaults,
        **{key: value for key, value in config.items() if key in defaults and key not in ignored_keys},
    }
    if steps_offset is not None and "steps_offset" in defaults:
        values["steps_offset"] = steps_offset
    try:
        schedule = make(scheduler(**values).alphas_cumprod, values)
        total, expected = schedule.num_train_timesteps, values["num_train_timesteps"]
        if total != expected:
            raise ValueError(f"trained_betas holds {total} numbers, num_train_timesteps is {expected}")
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ValueError(f"{file} describes no noise process ({error})") from error
    no_signal = schedule.alphas_cumprod[-1] <= 2**-24  # which some of diffusers' schedulers write for 0
    if values["prediction_type"] == "epsilon" and no_signal:
        raise ValueError(f"{file}: a zero-SNR schedule needs v_prediction or sample prediction, not epsilon")
    return schedule, values
