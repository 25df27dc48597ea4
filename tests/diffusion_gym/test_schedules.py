import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from diffusion_gym.schedules import (
    ConsistencySchedule,
    DiscreteVPSchedule,
    FlowSchedule,
    KarrasSchedule,
    LatentConsistencySchedule,
)

PROCESSES = {
    "emoji": {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear"},
    "stable_diffusion": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "zero_snr": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
    },
}


@pytest.mark.parametrize("process", PROCESSES)
def test_alpha_and_sigma_are_those_of_diffusers(process):
    bar = DDIMScheduler(**PROCESSES[process]).alphas_cumprod.double()
    schedule = DiscreteVPSchedule(bar)
    t = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t), bar.sqrt(), rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.sigma(t), (1 - bar).sqrt(), rtol=1e-13, atol=0)
    assert schedule.alpha(t.int()).dtype == torch.float32
    torch.testing.assert_close(schedule.alpha(t.int()).double(), bar.sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("process", PROCESSES)
def test_process_between_the_indices_is_variance_preserving_and_monotonic(process):
    schedule = DiscreteVPSchedule(DDIMScheduler(**PROCESSES[process]).alphas_cumprod)
    t = torch.linspace(-1, 999, 20_001, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-14, atol=0)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()


def test_log_alpha_is_linear_between_indices():
    schedule = DiscreteVPSchedule(DDIMScheduler(**PROCESSES["emoji"]).alphas_cumprod)
    log_alpha = schedule.alpha(torch.tensor([500.0, 500.25, 501.0], dtype=torch.float64)).log().tolist()
    assert log_alpha[1] == pytest.approx(0.75 * log_alpha[0] + 0.25 * log_alpha[2], rel=1e-13)


@pytest.mark.parametrize(
    "schedule",
    [DiscreteVPSchedule(torch.linspace(0.99, 0, 50)), FlowSchedule(), KarrasSchedule()],
    ids=lambda s: type(s).__name__,
)
def test_clean_end_has_all_signal_and_no_noise(schedule):
    end = torch.tensor([schedule.clean])
    assert schedule.alpha(end) == 1
    assert schedule.sigma(end) == 0


@pytest.mark.parametrize(
    ("schedule", "length", "unit"),
    [(DiscreteVPSchedule(torch.linspace(0.99, 0.1, 50)), 50, 1), (FlowSchedule(), 1, 0), (KarrasSchedule(), 80, 0)],
    ids=lambda value: type(value).__name__ if hasattr(value, "clean") else str(value),
)
def test_training_times_are_uniform_over_a_part_of_the_process(schedule, length, unit):
    """Indices from the part's first to its last, or times but for the clean end itself, where nothing is to learn."""
    uniform = torch.arange(10_000) / 10_000
    for low, high in ((0.0, 1.0), (0.6, 0.9)):
        times = schedule.training_times(uniform, within=(low, high)) / length
        assert times.min() == pytest.approx(low, abs=2e-4)
        assert times.max() == pytest.approx(high - unit / length, abs=2e-4)
        assert times.mean() == pytest.approx((low + high - unit / length) / 2, abs=1e-3)
        assert schedule.sigma(times * length).min() > 0
    assert schedule.training_times(torch.tensor(1 - 2**-24), within=(0.8, 1.0)) <= schedule.max_time


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 4, 20, 30, 50])
def test_discrete_grid_is_that_of_ddim_scheduler(spacing, offset, num_steps):
    scheduler = DDIMScheduler(**PROCESSES["emoji"], timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(num_steps)
    for ends_clean, end in ((False, 0), (True, -1)):
        schedule = DiscreteVPSchedule(scheduler.alphas_cumprod, spacing, steps_offset=offset, ends_clean=ends_clean)
        assert schedule.timesteps(num_steps).tolist() == [*scheduler.timesteps.tolist(), end]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [2, 28])
def test_flow_grid_is_that_of_flow_match_euler(shift, num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    grid = FlowSchedule(shift=shift).timesteps(num_steps)
    torch.testing.assert_close(grid.float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)


def test_karras_grid_is_that_of_edm():
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(18)
    grid = KarrasSchedule(sigma_min=0.002, sigma_max=80.0, rho=7.0).timesteps(18)
    torch.testing.assert_close(grid.float(), scheduler.sigmas, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("schedule", [FlowSchedule(), KarrasSchedule()], ids=lambda s: type(s).__name__)
def test_sigma_of_flow_and_ve_is_the_time_itself_in_memory_of_its_own(schedule):
    t = torch.tensor([0.25, 0.5])
    assert schedule.sigma(t).tolist() == [0.25, 0.5]
    assert schedule.sigma(t).data_ptr() != t.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_half_and_integer_times_are_worked_on_in_float32(dtype):
    schedule = DiscreteVPSchedule(DDIMScheduler(**PROCESSES["emoji"]).alphas_cumprod)
    t = torch.tensor([1, 64, 128]).to(dtype)
    assert schedule.sigma(t).dtype == torch.float32
    assert torch.equal(schedule.sigma(t), schedule.sigma(t.float()))


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="strictly decreasing"):
        DiscreteVPSchedule(torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match="between 1 and 1000, got 0"):
        DiscreteVPSchedule(torch.from_numpy(np.linspace(0.99, 0.1, 1000))).timesteps(0)
    with pytest.raises(ValueError, match="at least 1, got -3"):
        FlowSchedule().timesteps(-3)
    with pytest.raises(ValueError, match=r"whole number, got 2\.5"):
        FlowSchedule().timesteps(2.5)
    with pytest.raises(ValueError, match="starts beyond 999"):
        DiscreteVPSchedule(torch.linspace(0.99, 0.01, 1000), steps_offset=1).timesteps(1000)


@pytest.mark.parametrize("name", [*PROCESSES, "flow", "karras"])
def test_time_of_is_the_inverse_of_the_noise_ratio(name):
    schedule = {"flow": FlowSchedule(), "karras": KarrasSchedule()}.get(name)
    if schedule is None:
        schedule = DiscreteVPSchedule(DDIMScheduler(**PROCESSES[name]).alphas_cumprod)
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        t = torch.linspace(schedule.clean, schedule.start_time, 4001, dtype=torch.float64)[1:].to(dtype)
        ratio = schedule.noise_ratio(t)
        assert (ratio.diff() > 0).all()
        torch.testing.assert_close(schedule.noise_ratio(schedule.time_of(ratio)), ratio, rtol=rtol, atol=0)
        torch.testing.assert_close(schedule.time_of(ratio), t, rtol=rtol, atol=rtol * schedule.max_time)
    assert schedule.time_of(torch.zeros(1)) == schedule.clean


def test_noise_ratio_is_sigma_over_alpha_and_on_a_flow_sigma():
    t = torch.tensor([0.25, 0.5])
    assert FlowSchedule().noise_ratio(t).tolist() == [0.25, 0.5]
    assert KarrasSchedule().noise_ratio(t).tolist() == [0.25, 0.5]
    schedule = DiscreteVPSchedule(DDIMScheduler(**PROCESSES["emoji"]).alphas_cumprod)
    bar = schedule.alphas_cumprod[[100, 900]].double()
    torch.testing.assert_close(schedule.noise_ratio(torch.tensor([100.0, 900.0]).double()), (1 / bar - 1).sqrt())


def test_a_process_without_signal_at_its_end_starts_one_index_below():
    schedule = DiscreteVPSchedule(DDIMScheduler(**PROCESSES["zero_snr"]).alphas_cumprod)
    assert schedule.start_time == 998
    assert torch.isfinite(schedule.noise_ratio(torch.tensor([998.0])))
    assert DiscreteVPSchedule(DDIMScheduler(**PROCESSES["emoji"]).alphas_cumprod).start_time == 999


@pytest.mark.parametrize("original_steps", [1, 7, 50, 100])
def test_the_grid_of_a_latent_consistency_model_is_that_of_diffusers(original_steps):
    scheduler = LCMScheduler(original_inference_steps=original_steps)
    schedule = LatentConsistencySchedule(scheduler.alphas_cumprod, original_steps=original_steps)
    for num_steps in range(1, original_steps + 1):
        scheduler.set_timesteps(num_steps)
        assert schedule.timesteps(num_steps).tolist() == [*scheduler.timesteps.tolist(), -1.0]
    with pytest.raises(ValueError, match=f"num_steps must be between 1 and {original_steps}, got {original_steps + 1}"):
        schedule.timesteps(original_steps + 1)
    again = pickle.loads(pickle.dumps(schedule))
    assert (type(again), again.original_steps) == (LatentConsistencySchedule, original_steps)


@pytest.mark.parametrize("original_steps", [0, 1001])
def test_a_latent_consistency_model_has_no_more_times_than_its_process(original_steps):
    with pytest.raises(ValueError, match=f"original_steps must be between 1 and 1000, got {original_steps}"):
        LatentConsistencySchedule(LCMScheduler().alphas_cumprod, original_steps=original_steps)


def test_a_flow_refuses_shifts_and_spacings_that_are_none():
    for shift in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="shift must be a finite number above 0"):
            FlowSchedule(shift=shift)
    with pytest.raises(ValueError, match=r"spacing must be one of .*, got 'odd'"):
        FlowSchedule(spacing="odd")


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 39])
def test_consistency_models_grid_is_diffusers(num_steps):
    schedule = ConsistencySchedule()
    scheduler = CMStochasticIterativeScheduler()
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(schedule.timesteps(num_steps).float(), scheduler.sigmas, rtol=1e-5, atol=1e-7)


def test_consistency_models_noise_is_that_above_the_boundary():
    schedule = ConsistencySchedule(sigma_min=0.5, sigma_max=10.0)
    t = torch.tensor([0.5, 1.3, 10.0])
    torch.testing.assert_close(schedule.sigma(t), (t**2 - 0.25).sqrt())
    assert float(schedule.sigma(torch.tensor([schedule.clean]))) == 0.0
    torch.testing.assert_close(schedule.time_of(schedule.noise_ratio(t)), t)
    with pytest.raises(ValueError, match="num_train_timesteps must be"):
        ConsistencySchedule(num_train_timesteps=1)
