"""The classes, keys and values in a diffusers folder's configurations that this package understands.

Diffusers builds the networks and checks their shapes. This module covers what else changes a sample: the noise process,
the inputs that a network wants, and the pipeline's own corrections. What is not understood is refused; settings of the
folder's own sampler are only warned about, because this package samples with its own steps.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import diffusers

from ..naming import did_you_mean
from ..schedules import TimestepSpacing


@dataclass(frozen=True)
class Values:
    """The values of a key that are understood.

    Args:
        allowed: Whether a value is understood.
        words: The values that are, in words.
        cure: The remedy for another value.
        is_refused: Another value is refused; else it is warned about and ignored.
    """

    allowed: Callable[[Any], bool]
    words: str
    cure: str = "restore the file that came with the model"
    is_refused: bool = True


def is_count(value: object, *, minimum: int = 1) -> bool:
    """Return whether a value is a whole number of at least `minimum`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(names: Iterable[Any], cure: str = "", *, is_refused: bool = True) -> Values:
    names = tuple(names)

    def allowed(value: object) -> bool:
        return any(type(value) is type(name) and value == name for name in names)

    words = names[0] if len(names) == 1 else f"one of {list(names)}"
    return Values(allowed, str(words), cure or Values.cure, is_refused)


_FLAG = _one_of((True, False))
_NUMBER_BELOW_ONE = Values(lambda value: _is_number(value) and 0 < value < 1, "a number between 0 and 1")
_OWN_WALK = "give num_steps that suit this package's steps, or write a DDIMScheduler there, and the warning goes"
_OTHER_PROCESS = "use a model of a discrete variance-preserving process, such as Stable Diffusion 1.x or 2.x"
_SAME_INPUTS = "use a UNet that is told nothing but latents, time and text, such as Stable Diffusion's"

SCHEDULER: Mapping[str, Values] = {
    "num_train_timesteps": Values(lambda value: is_count(value, minimum=2), "a whole number of at least 2"),
    "beta_start": _NUMBER_BELOW_ONE,
    "beta_end": _NUMBER_BELOW_ONE,
    "beta_schedule": _one_of(("linear", "scaled_linear", "squaredcos_cap_v2")),
    "trained_betas": Values(
        lambda value: value is None or (isinstance(value, list) and len(value) > 1 and all(map(_is_number, value))),
        "null or a list of numbers",
    ),
    "prediction_type": _one_of(("epsilon", "v_prediction", "sample"), _OTHER_PROCESS),
    "timestep_spacing": _one_of(get_args(TimestepSpacing)),
    "steps_offset": Values(lambda value: is_count(value, minimum=0), "a whole number of at least 0"),
    "set_alpha_to_one": _FLAG,
    "rescale_betas_zero_snr": _FLAG,
    "clip_sample": _FLAG,  # the pipeline switches it off
    "thresholding": _one_of((False,), "it is for images, not for latents: set it to false"),
    "use_flow_sigmas": _one_of((False, None), _OTHER_PROCESS),
    "timestep_type": _one_of(("discrete",), _OTHER_PROCESS),
    "use_karras_sigmas": _one_of((False, None), _OWN_WALK, is_refused=False),
    "use_exponential_sigmas": _one_of((False, None), _OWN_WALK, is_refused=False),
    "use_beta_sigmas": _one_of((False, None), _OWN_WALK, is_refused=False),
    "use_lu_lambdas": _one_of((False, None), _OWN_WALK, is_refused=False),
    "use_dynamic_shifting": _one_of((False, None), _OWN_WALK, is_refused=False),
    "final_sigmas_type": _one_of(("zero",), _OWN_WALK, is_refused=False),
    "interpolation_type": _one_of(("linear",), _OWN_WALK, is_refused=False),
    "sigma_min": _one_of((None,), _OWN_WALK, is_refused=False),
    "sigma_max": _one_of((None,), _OWN_WALK, is_refused=False),
    "lambda_min_clipped": _one_of((-math.inf,), _OWN_WALK, is_refused=False),
}

_UNCLIPPED = _one_of((False,), "the pipeline would clip latents, which are larger: set it to false")
XL_SCHEDULER: Mapping[str, Values] = {**SCHEDULER, "clip_sample": _UNCLIPPED}
_OWN_FLOW = "give num_steps that suit the evenly spaced times; or write the default there, and the warning goes"

FLOW_SCHEDULER: Mapping[str, Values] = {
    "num_train_timesteps": Values(lambda value: is_count(value, minimum=2), "a whole number of at least 2"),
    "shift": Values(lambda value: _is_number(value) and value > 0, "a number above 0"),
    "use_dynamic_shifting": _FLAG,
    "base_shift": Values(lambda value: value is None or _is_number(value), "null or a number"),
    "max_shift": Values(lambda value: value is None or _is_number(value), "null or a number"),
    "base_image_seq_len": Values(is_count, "a whole number of at least 1"),
    "max_image_seq_len": Values(is_count, "a whole number of at least 1"),
    "time_shift_type": _one_of(("exponential", "linear")),
    "invert_sigmas": _one_of((False, None), "its time runs from image to noise: use a flow whose time is its noise"),
    "shift_terminal": _one_of((None, 0, 0.0), _OWN_FLOW, is_refused=False),
    "use_karras_sigmas": _one_of((False, None), _OWN_FLOW, is_refused=False),
    "use_exponential_sigmas": _one_of((False, None), _OWN_FLOW, is_refused=False),
    "use_beta_sigmas": _one_of((False, None), _OWN_FLOW, is_refused=False),
    "stochastic_sampling": _one_of(
        (False, None), "give the policy a sampler; or write false there, and the warning goes", is_refused=False
    ),
}

UNET: Mapping[str, Values] = {
    "class_embed_type": _one_of((None,), _SAME_INPUTS),
    "num_class_embeds": _one_of((None,), _SAME_INPUTS),
    "addition_embed_type": _one_of((None,), _SAME_INPUTS),
    "encoder_hid_dim": _one_of((None,), _SAME_INPUTS),
    "encoder_hid_dim_type": _one_of((None,), _SAME_INPUTS),
    "time_cond_proj_dim": _one_of(
        (None,),
        "a UNet that is told the guidance scale is a latent consistency model's, whose model_index.json must name "
        "LatentConsistencyModelPipeline and LCMScheduler (of Stable Diffusion XL there is no such pipeline)",
    ),
    "norm_num_groups": Values(is_count, "a whole number of at least 1", _SAME_INPUTS),
}

XL_UNET: Mapping[str, Values] = {
    **UNET,
    "addition_embed_type": _one_of(
        ("text_time",), "use a UNet that is told pooled texts and sizes, as Stable Diffusion XL's"
    ),
    "addition_time_embed_dim": Values(is_count, "a whole number of at least 1"),
    "projection_class_embeddings_input_dim": Values(is_count, "a whole number of at least 1"),
}

LCM_SCHEDULER: Mapping[str, Values] = {
    **SCHEDULER,
    "clip_sample": _UNCLIPPED,
    "original_inference_steps": Values(is_count, "a whole number of at least 1"),
    "timestep_scaling": Values(lambda value: _is_number(value) and value > 0, "a number above 0"),
}

_POSITIVE = Values(lambda value: _is_number(value) and value > 0, "a number above 0")
KARRAS_SCHEDULER: Mapping[str, Values] = {
    "sigma_min": _POSITIVE,
    "sigma_max": _POSITIVE,
    "rho": _POSITIVE,
    "num_train_timesteps": Values(lambda value: is_count(value, minimum=2), "a whole number of at least 2"),
    "prediction_type": _one_of(("epsilon",), "it is for networks of EDM, which are told other inputs"),
    "sigma_schedule": _one_of(("karras",), _OWN_WALK, is_refused=False),
    "final_sigmas_type": _one_of(("zero",), _OWN_WALK, is_refused=False),
}

CONSISTENCY_SCHEDULER: Mapping[str, Values] = {
    "num_train_timesteps": Values(lambda value: is_count(value, minimum=2), "a whole number of at least 2"),
    "sigma_min": _POSITIVE,
    "sigma_max": _POSITIVE,
    "sigma_data": _POSITIVE,
    "rho": _POSITIVE,
    "s_noise": _one_of((1, 1.0), "noise is drawn as the process has it"),
    "clip_denoised": _FLAG,
}

PIXEL_UNET: Mapping[str, Values] = {
    "class_embed_type": _one_of((None,), "use a UNet whose classes are numbers"),
    "num_class_embeds": Values(lambda value: value is None or is_count(value), "null or a whole number of at least 1"),
    "in_channels": _one_of((3,), "use a UNet of RGB images"),
    "out_channels": _one_of((3,), "use a UNet of RGB images"),
    "time_embedding_type": _one_of(("positional", "fourier"), "use a UNet that is told the time and the class"),
}

LCM_UNET: Mapping[str, Values] = {
    **UNET,
    "time_cond_proj_dim": Values(
        lambda value: is_count(value, minimum=4),
        "a whole number of at least 4",
        "use a UNet that is told the guidance scale, as that of LCM_Dreamshaper_v7",
    ),
}

FLUX: Mapping[str, Values] = {
    "patch_size": _one_of((1,), "use a transformer whose latents are packed by the pipeline alone, as Flux.1's"),
    "axes_dims_rope": Values(
        lambda value: (
            isinstance(value, list | tuple)
            and len(value) == 3
            and all(is_count(axis) and axis % 2 == 0 for axis in value)
        ),
        "three even numbers",
    ),
}

VAE: Mapping[str, Values] = {
    "in_channels": _one_of((3,), "use an autoencoder of RGB images"),
    "out_channels": _one_of((3,), "use an autoencoder of RGB images"),
    "scaling_factor": Values(lambda value: _is_number(value) and value > 0, "a number above 0"),
}

_NO_STATISTICS = _one_of((None,), "an autoencoder whose latents are standardised is not supported: use another")
XL_VAE: Mapping[str, Values] = {**VAE, "latents_mean": _NO_STATISTICS, "latents_std": _NO_STATISTICS}
SHIFTED_VAE: Mapping[str, Values] = {**VAE, "shift_factor": Values(_is_number, "a number")}

# Schedulers whose timesteps are those of `DiscreteVPSchedule`, and those that take other ones unless "trailing".
_SAME_TIMES = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)
_OTHER_TIMES = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


def scheduler_class(name: object, file: Path) -> type:
    """Return the class of a scheduler that a file names, out of a closed list.

    Raises:
        ValueError: it is not in the list.
    """
    if name not in (*_SAME_TIMES, *_OTHER_TIMES):
        raise ValueError(
            f"{file}: the scheduler {name!r} is not understood: allowed are "
            f"{', '.join(sorted((*_SAME_TIMES, *_OTHER_TIMES)))}. If the model can be sampled with DDIM's steps "
            "(those that were distilled for LCMScheduler or TCDScheduler cannot), write a DDIMScheduler there"
        )
    return getattr(diffusers, str(name))


def warn_of_other_times(name: str, spacing: object, file: Path) -> None:
    """Warn where a scheduler visits other times than this package does."""
    if name in _OTHER_TIMES and spacing != "trailing":
        warnings.warn(
            f"{file}: {name} visits other times than this package, which samples with its own steps on DDIM's: "
            f"{_OWN_WALK}",
            stacklevel=2,
        )


def keys_of(network: type) -> dict[str, Any]:
    """Return the keys of a class's configuration, and their defaults."""
    parameters = inspect.signature(network.__init__).parameters  # type: ignore[misc]
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def _may_be(value: object, parameter: inspect.Parameter) -> bool:
    """Return whether a value fits a parameter whose default is a number: diffusers fails only when some are used."""
    if isinstance(parameter.default, bool) or not isinstance(parameter.default, Real) or isinstance(value, Real):
        return True
    words = str(parameter.annotation).lower()
    return ("none" in words or "optional" in words) if value is None else (isinstance(value, list) and "tuple" in words)


def check_values(config: Mapping[str, Any], network: type, understood: Mapping[str, Values], file: Path) -> None:
    """Check that all values of a configuration are understood; a key that is not there has its class's default.

    Args:
        config: The file's content.
        network: The class that it is for; keys of other classes have no effect on it.
        understood: The values that are understood.
        file: The file.

    Raises:
        ValueError: a value is not.
    """
    keys = keys_of(network)
    for key, values in understood.items():
        if key in keys and not values.allowed(value := config.get(key, keys[key])):
            message = f"{file}: {key} must be {values.words} for this package, got {value!r}: {values.cure}"
            if values.is_refused:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
    for key, parameter in inspect.signature(network.__init__).parameters.items():  # type: ignore[misc]
        if key in config and key not in understood and not _may_be(config[key], parameter):
            raise ValueError(f"{file}: {key} must be {parameter.annotation}, got {config[key]!r}: {Values.cure}")
    scheduler_keys = {key for name in (*_SAME_TIMES, *_OTHER_TIMES) for key in keys_of(getattr(diffusers, name))}
    known_keys = (
        {*keys, *scheduler_keys, "quantization_config"}
        if issubclass(network, diffusers.SchedulerMixin)
        else {*keys, "quantization_config"}
    )
    for key in config:
        if key not in known_keys and not key.startswith("_"):
            message = f"{file}: {key!r} is no key of {network.__name__}, and passed over.{did_you_mean(key, keys)}"
            warnings.warn(message, stacklevel=2)


def component(index: Mapping[str, Any], name: str, file: Path) -> tuple[str, str]:
    """Return the library and the class that a `model_index.json` names for a part of the pipeline.

    Raises:
        ValueError: it names none.
    """
    value = index.get(name)
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(part, str) for part in value):
        raise ValueError(
            f'{file}: {name} must be ["library", "class"], got {value!r}: restore the file, or use a model that has '
            "this part (a refiner, which goes on from another model's latents, has not)"
        )
    return value[0], value[1]


def check_components(index: Mapping[str, Any], allowed: Mapping[str, Iterable[str]], file: Path) -> None:
    """Check that all parts of a pipeline are of classes that are understood; none is looked up by name.

    Raises:
        ValueError: one is not.
    """
    for name, classes in allowed.items():
        library, class_name = component(index, name, file)
        if class_name not in classes or library not in ("diffusers", "transformers"):
            raise ValueError(
                f"{file}: the {name} {library}.{class_name} is not understood: allowed are {', '.join(classes)}"
            )
