import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusion_gym.grids import (
    MAX_RATIO,
    MIN_RATIO,
    grid_through,
    karras_grid,
    power_grid,
    shifted_grid,
    step_ratios,
    uniform_grid,
)
from diffusion_gym.schedules import DiscreteVPSchedule, FlowSchedule, KarrasSchedule, LatentConsistencySchedule

EMOJI = DiscreteVPSchedule(
    DDIMScheduler(beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear").alphas_cumprod
)
GRIDS = {
    "uniform": uniform_grid,
    "power": lambda schedule, n: power_grid(schedule, n, rho=0.7),
    "shifted": shifted_grid,
    "karras": karras_grid,
}


@pytest.mark.parametrize("num_steps", [1, 2, 5, 28])
@pytest.mark.parametrize("schedule", [EMOJI, FlowSchedule()], ids=["vp", "flow"])
@pytest.mark.parametrize("grid", GRIDS)
def test_grids_fall_from_start_to_clean_in_so_many_steps(grid, schedule, num_steps):
    times = GRIDS[grid](schedule, num_steps)
    assert len(times) == num_steps + 1
    assert (times.diff() < 0).all()
    assert times[0] == schedule.start_time
    assert times[-1] == schedule.clean


def test_grids_say_what_they_are():
    assert uniform_grid(FlowSchedule(), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert power_grid(FlowSchedule(), 2, rho=2.0).tolist() == [1, 0.25, 0]
    reference = KarrasSchedule(sigma_min=0.1, sigma_max=80.0).timesteps(10)
    torch.testing.assert_close(karras_grid(KarrasSchedule(), 10), reference, rtol=1e-9, atol=0)


def test_shifted_grid_is_stable_diffusion_3s():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = torch.linspace(1, 0, 11, dtype=torch.float64)
    expected = 3.0 * u / (1 + 2.0 * u)
    torch.testing.assert_close(shifted_grid(FlowSchedule(), 10), expected)
    scheduler.set_timesteps(sigmas=u[:-1].tolist())
    torch.testing.assert_close(shifted_grid(FlowSchedule(), 10).float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)


def test_step_ratios_walk_the_grid():
    times = uniform_grid(EMOJI, 6)
    ratios = step_ratios(EMOJI, times)
    tau = EMOJI.noise_ratio(times)
    torch.testing.assert_close(tau[0] * ratios.cumprod(0)[:-1], tau[1:-1])
    assert ratios[-1] == MIN_RATIO
    assert step_ratios(FlowSchedule(), torch.tensor([1.0, 0.9999, 0.0]))[0] == MAX_RATIO


def test_wrong_numbers_of_steps_are_refused():
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        uniform_grid(EMOJI, 0)
    for wrong in (2.0, "2", True, None):
        with pytest.raises(ValueError, match="num_steps must be a whole number"):
            karras_grid(EMOJI, wrong)
        with pytest.raises(ValueError, match="num_steps must be a whole number"):
            EMOJI.timesteps(wrong)


@pytest.mark.parametrize("schedule", [EMOJI, FlowSchedule(), KarrasSchedule()], ids=["vp", "flow", "karras"])
def test_numpy_integers_are_numbers_of_steps(schedule):
    assert torch.equal(schedule.timesteps(np.int64(4)), schedule.timesteps(4))
    assert torch.equal(uniform_grid(EMOJI, np.int32(4)), uniform_grid(EMOJI, 4))
    assert torch.equal(karras_grid(EMOJI, np.int64(1)), karras_grid(EMOJI, 1))


def test_step_ratios_need_no_float64_on_the_device():
    class OnDevice(torch.Tensor):
        """Stands for a tensor on one of Apple's GPUs."""

        def cpu(self):
            return self.as_subclass(torch.Tensor)

        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    times = uniform_grid(EMOJI, 6).float()
    assert torch.equal(step_ratios(EMOJI, times.as_subclass(OnDevice)), step_ratios(EMOJI, times))


def test_a_grid_through_given_times_ends_as_the_models_own_grids_do():
    assert grid_through(EMOJI, (801, 401)).tolist() == [801, 401, 0]
    assert grid_through(FlowSchedule(), [1, 0.25]).tolist() == [1, 0.25, 0]
    own = LatentConsistencySchedule(EMOJI.alphas_cumprod).timesteps(7).tolist()
    assert grid_through(LatentConsistencySchedule(EMOJI.alphas_cumprod), own[:-1]).tolist() == own
