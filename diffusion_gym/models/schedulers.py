"""diffusers' scheduler folders as noise schedules."""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffusers import (
    CMStochasticIterativeScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from ..predictions import PredictionType
from ..schedules import (
    ConsistencySchedule,
    DiscreteVPSchedule,
    FlowSchedule,
    FlowSpacing,
    KarrasSchedule,
    LatentConsistencySchedule,
)
from .folders import read_config
from .understood import (
    CONSISTENCY_SCHEDULER,
    FLOW_SCHEDULER,
    KARRAS_SCHEDULER,
    LCM_SCHEDULER,
    SCHEDULER,
    Values,
    check_values,
    keys_of,
    scheduler_class,
    warn_of_other_times,
)

FLOW = FlowMatchEulerDiscreteScheduler.__name__
KARRAS = EDMEulerScheduler.__name__

_Schedule = TypeVar("_Schedule", bound=DiscreteVPSchedule)


def _class_of(
    config: Mapping[str, Any], file: Path, *, asked: object, default: str, look_up: Callable[[object, Path], type]
) -> type:
    """Return a scheduler's class, with a warning where its file says another.

    Args:
        config: The file's content.
        file: The file.
        asked: The class that model_index.json names; None: there is none but the file's.
        default: The class of a file that names none.
        look_up: Returns the class of a name, or raises ValueError, which names the file.
    """
    name = config.get("_class_name", default) if asked is None else asked
    scheduler = look_up(name, file)
    written = config.get("_class_name", name)
    if written != name:
        warnings.warn(
            f"{file}: _class_name is {written!r}, model_index.json beside it says {name!r}, which is what diffusers' "
            "pipeline takes, and this package: make them one",
            stacklevel=3,
        )
    return scheduler


def _flow_class(name: object, file: Path) -> type:
    if name != FLOW:
        raise ValueError(
            f"{file}: the scheduler {name!r} is not understood: allowed is {FLOW}. If the model can be sampled with "
            "Euler's steps, write that there and in model_index.json"
        )
    return FlowMatchEulerDiscreteScheduler


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
    config = read_config(file)
    scheduler = _class_of(config, file, asked=class_name, default="DDIMScheduler", look_up=scheduler_class)

    def make(alphas_cumprod: Tensor, values: Mapping[str, Any]) -> DiscreteVPSchedule:
        return DiscreteVPSchedule(
            alphas_cumprod,
            spacing=values.get("timestep_spacing", "linspace"),
            steps_offset=values.get("steps_offset", 0),
            ends_clean=values.get("set_alpha_to_one", True),
        )

    schedule, values = _process(file, config, scheduler, make, understood=understood, steps_offset=steps_offset)
    warn_of_other_times(scheduler.__name__, schedule.spacing, file)
    return schedule, values["prediction_type"]


def consistency_schedule(folder: Path) -> tuple[LatentConsistencySchedule, PredictionType, float]:
    """Return the process of an `LCMScheduler` folder, what the denoiser predicts, and the times' factor in c_skip.

    Raises:
        FileNotFoundError, ValueError: the scheduler is not there, or holds something that is not understood.
    """

    def make(alphas_cumprod: Tensor, values: Mapping[str, Any]) -> LatentConsistencySchedule:
        return LatentConsistencySchedule(alphas_cumprod, original_steps=values["original_inference_steps"])

    file = folder / "scheduler_config.json"
    config, name = read_config(file), LCMScheduler.__name__
    scheduler = _class_of(config, file, asked=name, default=name, look_up=lambda *_: LCMScheduler)
    schedule, values = _process(file, config, scheduler, make, understood=LCM_SCHEDULER)
    return schedule, values["prediction_type"], float(values["timestep_scaling"])


def karras_schedule(folder: Path) -> KarrasSchedule:
    """Return the variance-exploding process of an `EDMEulerScheduler` folder.

    Raises:
        FileNotFoundError, ValueError: the scheduler is not there, or holds something that is not understood.
    """
    values = _values_of(folder / "scheduler_config.json", EDMEulerScheduler, KARRAS_SCHEDULER)
    return KarrasSchedule(float(values["sigma_min"]), float(values["sigma_max"]), float(values["rho"]))


def variance_exploding_consistency(folder: Path) -> tuple[ConsistencySchedule, float, bool]:
    """Return the process of a `CMStochasticIterativeScheduler` folder, σ_d, and whether f is clipped to [−1, 1].

    Raises:
        FileNotFoundError, ValueError: the scheduler is not there, or holds something that is not understood.
    """
    values = _values_of(folder / "scheduler_config.json", CMStochasticIterativeScheduler, CONSISTENCY_SCHEDULER)
    schedule = ConsistencySchedule(
        float(values["sigma_min"]), float(values["sigma_max"]), float(values["rho"]), values["num_train_timesteps"]
    )
    return schedule, float(values["sigma_data"]), values["clip_denoised"]


def _values_of(file: Path, scheduler: type, understood: Mapping[str, Values]) -> dict[str, Any]:
    """Return the values of a scheduler's file, completed by the class's defaults."""
    config, name = read_config(file), scheduler.__name__
    _class_of(config, file, asked=name, default=name, look_up=lambda *_: scheduler)
    check_values(config, scheduler, understood, file)
    values = {**keys_of(scheduler), **config}
    if values["sigma_min"] >= values["sigma_max"]:
        raise ValueError(f"{file}: sigma_min must be below sigma_max, got {values['sigma_min']}, {values['sigma_max']}")
    return values


def _process(
    file: Path,
    config: Mapping[str, Any],
    scheduler: type,
    make: Callable[[Tensor, Mapping[str, Any]], _Schedule],
    *,
    understood: Mapping[str, Values],
    steps_offset: int | None = None,
) -> tuple[_Schedule, dict[str, Any]]:
    """Return the noise process of a scheduler's file, and the file's values, completed by the class's defaults."""
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


def flow_schedule(
    folder: Path, *, class_name: object = None, tokens: int | None = None, is_even: bool = False
) -> FlowSchedule:
    """Return the rectified flow of a diffusers scheduler folder, with the grid on which its pipeline samples.

    The shift is the file's, or, with `use_dynamic_shifting`, depends on the size of the image:

        μ = base_shift + (max_shift − base_shift)·(tokens − base_image_seq_len) / (max_image_seq_len − …)
        shift = exp(μ)   if time_shift_type is "exponential",   μ   if it is "linear"

    Source: diffusers' `FlowMatchEulerDiscreteScheduler` and `calculate_shift` of its pipelines.

    Args:
        folder: The folder of `scheduler_config.json`.
        class_name: The scheduler's class; None: the one that the file names.
        tokens: The number of tokens of an image; None: the model's images have none.
        is_even: The pipeline divides the time evenly before the shift, as Flux's does.

    Raises:
        FileNotFoundError, ValueError: the scheduler is not there, or none that is understood.
    """
    file = folder / "scheduler_config.json"
    config = read_config(file)
    scheduler = _class_of(config, file, asked=class_name, default=FLOW, look_up=_flow_class)
    if is_even and config.get("use_flow_sigmas"):  # no key of the class, but its pipeline looks for it
        raise ValueError(f"{file}: use_flow_sigmas={config['use_flow_sigmas']!r} is not understood: remove it")
    check_values(config, scheduler, FLOW_SCHEDULER, file)
    values: dict[str, Any] = {**keys_of(scheduler), **config}
    spacing: FlowSpacing = "even" if is_even else "twice_shifted"
    shift = values["shift"]
    if values["use_dynamic_shifting"]:
        spacing = "even" if is_even else "full"
        shift = _dynamic_shift(values, tokens, file)
    return FlowSchedule(shift, values["num_train_timesteps"], spacing)


def _dynamic_shift(values: Mapping[str, Any], tokens: int | None, file: Path) -> float:
    """Return the shift for images of a number of tokens.

    Raises:
        ValueError: the values give none.
    """
    if tokens is None:
        raise ValueError(f"{file}: use_dynamic_shifting is for images, which this model has none of: set it to false")
    keys = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    base_shift, max_shift, base_length, max_length = (values[key] for key in keys)
    if base_shift is None or max_shift is None or base_length == max_length:
        raise ValueError(
            f"{file}: use_dynamic_shifting needs base_shift and max_shift, and two lengths that differ; got "
            f"{ {key: values[key] for key in keys} }: restore the file that came with the model"
        )
    slope = (max_shift - base_shift) / (max_length - base_length)
    mu = tokens * slope + (base_shift - slope * base_length)
    shift = math.exp(mu) if values["time_shift_type"] == "exponential" else mu
    if not shift > 0:
        raise ValueError(f"{file}: for {tokens} tokens the shift is {shift:.3g}, which must be above 0")
    return shift
