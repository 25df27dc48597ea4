"""Flow schedules are those of the folder's scheduler, as its pipeline uses it."""

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from diffusion_gym.models.schedulers import flow_schedule

STEPS = [1, 2, 3, 4, 7, 10, 20, 28, 50, 100, 999, 1000]
SIZES = [64, 256, 1024, 4096, 9216]  # tokens of images of 128 to 1536 pixels
PUBLISHED = {
    "sd3": {"shift": 3.0},
    "flux-dev": {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "flux-schnell": {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 3.0},
    "short": {"use_dynamic_shifting": True, "num_train_timesteps": 100, "base_image_seq_len": 64},
}


def write(folder, **config):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **config}
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def mu_of(scheduler, tokens):
    config = scheduler.config
    return calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )


@pytest.mark.parametrize("is_even", [False, True], ids=["sd3", "flux"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_grid_is_the_pipelines(tmp_path, name, is_even):
    """Stable Diffusion 3's pipeline gives the scheduler a number of steps, Flux's evenly spaced times."""
    folder = write(tmp_path, **PUBLISHED[name])
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
    for tokens in SIZES:
        mu = mu_of(scheduler, tokens) if scheduler.config.use_dynamic_shifting else None
        schedule = flow_schedule(folder, tokens=tokens, is_even=is_even)
        for num_steps in STEPS:
            if is_even:
                scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
            else:
                scheduler.set_timesteps(num_steps, mu=mu)
            grid = schedule.timesteps(num_steps)
            assert grid[0] == 1
            assert (grid.diff() < 0).all()
            torch.testing.assert_close(grid.float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "'FlowMatchHeunDiscreteScheduler' is not understood"),
        ({"_class_name": "DDIMScheduler"}, "'DDIMScheduler' is not understood: allowed is FlowMatchEuler"),
        ({"shift": 0}, "shift must be a number above 0 for this package, got 0"),
        ({"shift": None}, "shift must be a number above 0 for this package, got None"),
        ({"num_train_timesteps": 1}, "num_train_timesteps must be a whole number of at least 2"),
        ({"use_dynamic_shifting": "no"}, "use_dynamic_shifting must be one of"),
        ({"time_shift_type": "cubic"}, "time_shift_type must be one of"),
        ({"invert_sigmas": True}, "invert_sigmas must be one of .* got True: its time runs from image to noise"),
        ({"use_dynamic_shifting": True, "max_shift": None}, "use_dynamic_shifting needs base_shift and max_shift"),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 256}, "two lengths that differ"),
        ({"use_dynamic_shifting": True, "base_shift": -9.0, "time_shift_type": "linear"}, "the shift is -9, which"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True is not understood: remove it"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, values, message):
    with pytest.raises(ValueError, match=rf"scheduler_config\.json: .*{message}"):
        flow_schedule(write(tmp_path, **values), tokens=256, is_even=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("shift_terminal", 0.1),
        ("stochastic_sampling", True),
    ],
)
def test_steps_that_are_not_reproduced_are_warned_about(tmp_path, key, value):
    with pytest.warns(UserWarning, match=rf"scheduler_config\.json: {key} must be .* got {value!r}: .*warning goes"):
        schedule = flow_schedule(write(tmp_path, shift=3.0, **{key: value}))
    assert schedule.shift == 3


def test_a_class_that_two_files_disagree_about_is_the_pipelines(tmp_path):
    folder = write(tmp_path, _class_name="DDIMScheduler")
    with pytest.warns(UserWarning, match="model_index.json beside it says 'FlowMatchEuler"):
        flow_schedule(folder, class_name="FlowMatchEulerDiscreteScheduler")


def test_a_model_without_tokens_has_no_shift_for_them(tmp_path):
    with pytest.raises(ValueError, match="use_dynamic_shifting is for images, which this model has none of"):
        flow_schedule(write(tmp_path, use_dynamic_shifting=True))
