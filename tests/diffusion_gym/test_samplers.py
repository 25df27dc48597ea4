import math
from dataclasses import FrozenInstanceError
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from diffusion_gym.parts import described, made
from diffusion_gym.predictions import to_x0_and_epsilon
from diffusion_gym.samplers import CPS, DDIM, Consistency, FlowSDE, Sampler, Windowed
from diffusion_gym.schedules import DiscreteVPSchedule, FlowSchedule, KarrasSchedule
from diffusion_gym.transitions import transition

from .test_schedules import PROCESSES

SHAPE = (3, 4, 8, 8)
EMOJI = DiscreteVPSchedule(DDIMScheduler(**PROCESSES["emoji"]).alphas_cumprod)
SCHEDULES = {"discrete": EMOJI, "flow": FlowSchedule(shift=3.0), "variance exploding": KarrasSchedule()}
FAMILY = [DDIM(0.0), DDIM(0.3), DDIM(1.0), CPS(0.0), CPS(0.7), CPS(1.0), Consistency()]
SAMPLERS = [*FAMILY, FlowSDE(0.7), Windowed(CPS(0.5), 700.0, 300.0)]


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_float64(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.as_tensor(scheduler.final_alpha_cumprod).double()
    return scheduler


# The steps of other codes.


@pytest.mark.parametrize("ends_clean", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("process", PROCESSES)
def test_ddim_matches_diffusers(process, prediction_type, eta, ends_clean):
    scheduler = in_float64(
        DDIMScheduler(
            **PROCESSES[process],
            prediction_type=prediction_type,
            clip_sample=False,
            set_alpha_to_one=ends_clean,
            steps_offset=1,
        )
    )
    scheduler.set_timesteps(20)
    schedule = DiscreteVPSchedule(scheduler.alphas_cumprod, steps_offset=1, ends_clean=ends_clean)
    latents, output, noise = seeded(SHAPE), seeded(SHAPE, seed=1), seeded(SHAPE, seed=2)
    for now, following in pairwise(schedule.timesteps(20)):
        expected = scheduler.step(output, int(now), latents, eta=eta, variance_noise=noise if eta else None)
        t, s = now.expand(3), following.expand(3)
        x0, epsilon = to_x0_and_epsilon(
            output, latents, alpha=schedule.alpha(t), sigma=schedule.sigma(t), prediction_type=prediction_type
        )
        step = transition(x0, epsilon, DDIM(eta).scales(schedule, t, s))
        moved = step.mean + step.std[:, None, None, None] * noise
        scale = expected.pred_original_sample.abs().max()
        torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-11, atol=0)
        assert (moved - expected.prev_sample).abs().max() / scale < 2e-13


def test_ddim_on_a_flow_matches_euler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    scheduler.sigmas = scheduler.sigmas.double()
    schedule = FlowSchedule(shift=3.0)
    latents = seeded(SHAPE).float().double()  # diffusers rounds them to float32 before it steps in float64
    velocity = seeded(SHAPE, seed=1)
    for index, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(velocity, timestep, latents).prev_sample
        t, s = scheduler.sigmas[index].expand(3), scheduler.sigmas[index + 1].expand(3)
        x0, epsilon = to_x0_and_epsilon(
            velocity, latents, alpha=schedule.alpha(t), sigma=schedule.sigma(t), prediction_type="flow"
        )
        mean = transition(x0, epsilon, DDIM(0.0).scales(schedule, t, s)).mean
        torch.testing.assert_close(mean, expected, rtol=1e-14, atol=1e-14)


def test_consistency_matches_lcm():
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_scaling=1e9, clip_sample=False
    )
    scheduler.set_timesteps(4)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = DiscreteVPSchedule(scheduler.alphas_cumprod)
    latents, output = seeded(SHAPE), seeded(SHAPE, seed=1)
    for now, following in pairwise(scheduler.timesteps):
        expected = scheduler.step(output, now, latents, generator=torch.Generator().manual_seed(7))
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        t, s = now.expand(3).double(), following.expand(3).double()
        x0, epsilon = to_x0_and_epsilon(
            output, latents, alpha=schedule.alpha(t), sigma=schedule.sigma(t), prediction_type="epsilon"
        )
        step = transition(x0, epsilon, Consistency().scales(schedule, t, s))
        moved = step.mean + step.std[:, None, None, None] * noise
        torch.testing.assert_close(moved, expected.prev_sample, rtol=1e-12, atol=1e-12)


def flow_steps():
    """Times, latents and a velocity, and what a flow predicts from them."""
    t, s = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.7, 0.4, 0.05]).double()
    latents, velocity = seeded(SHAPE), seeded(SHAPE, seed=1)
    x0, epsilon = to_x0_and_epsilon(velocity, latents, alpha=1 - t, sigma=t, prediction_type="flow")
    return t, s, latents, velocity, x0, epsilon


def test_cps_is_the_published_formula():
    t, s, latents, velocity, x0, epsilon = flow_steps()
    sigma, sigma_next = t[:, None, None, None], s[:, None, None, None]
    std = sigma_next * math.sin(0.7 * math.pi / 2)
    image, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
    expected = image * (1 - sigma_next) + noise * (sigma_next**2 - std**2).sqrt()
    step = transition(x0, epsilon, CPS(nu=0.7).scales(FlowSchedule(), t, s))
    torch.testing.assert_close(step.mean, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step.std, std.flatten(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("a", [0.3, 0.7, 1.0])
def test_flow_sde_is_the_published_formula(a):
    """In the words of Flow-GRPO's code: the latents drift by the velocity, sigma falls by −dt."""
    sigmas = FlowSchedule(shift=3.0).timesteps(10)
    latents, velocity = seeded(1, 4, 8, 8), seeded(1, 4, 8, 8, seed=1)
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        level = a * torch.sqrt(sigma / (1 - (sigmas[1] if index == 0 else sigma)))
        dt = sigma_next - sigma
        drift = 1 + level**2 * (1 - sigma) / (2 * sigma)
        expected = latents * (1 + level**2 / (2 * sigma) * dt) + velocity * drift * dt
        t, s = sigma[None], sigma_next[None]
        x0, epsilon = to_x0_and_epsilon(velocity, latents, alpha=1 - t, sigma=t, prediction_type="flow")
        step = transition(x0, epsilon, FlowSDE(a).scales(FlowSchedule(), t, s))
        torch.testing.assert_close(step.mean, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(step.std, level[None] * torch.sqrt(-dt), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["discrete", "variance exploding"])
def test_flow_sde_is_refused_by_other_processes(name):
    t = torch.tensor([0.5])
    with pytest.raises(ValueError, match=r"FlowSDE is a sampler of rectified flows, got a (DiscreteVP|Karras)Schedule"):
        FlowSDE().scales(SCHEDULES[name], t, t / 2)
    assert [schedule.is_flow for schedule in SCHEDULES.values()] == [False, True, False]


# The family.


@pytest.mark.parametrize("sampler", FAMILY, ids=repr)
@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_level_after_any_step_is_that_of_the_process(name, sampler):
    """x_s has the signal α_s and the noise σ_s, of which std is the fresh part, whatever it is."""
    schedule = SCHEDULES[name]
    grid = schedule.timesteps(20)
    scales = sampler.scales(schedule, grid[:-1], grid[1:])
    sigma = schedule.sigma(grid[1:])
    torch.testing.assert_close(scales.x0, schedule.alpha(grid[1:]), rtol=0, atol=0)
    torch.testing.assert_close((scales.epsilon**2 + scales.std**2).sqrt(), sigma, rtol=1e-12, atol=0)
    assert ((scales.std >= 0) & (scales.std <= sigma)).all()


@pytest.mark.parametrize("sampler", [DDIM(0.0), CPS(0.0), FlowSDE(0.0)], ids=repr)
def test_without_noise_every_sampler_is_the_deterministic_step_and_says_so(sampler):
    grid = FlowSchedule().timesteps(10)
    expected = DDIM(0.0).scales(FlowSchedule(), grid[:-1], grid[1:])
    scales = sampler.scales(FlowSchedule(), grid[:-1], grid[1:])
    assert scales.deterministic
    for name in ("x0", "epsilon", "std"):
        torch.testing.assert_close(getattr(scales, name), getattr(expected, name), rtol=1e-15, atol=0)
    assert (scales.std == 0).all()


def std_of_the_chain(sampler, schedule, num_steps, *, data_std):
    """The standard deviation of x_0 that a sampler draws with the exact denoiser of N(0, data_std²), in float64.

    Every step is linear in x: x̂_0 = α_t·c²/v·x and ε̂ = σ_t/v·x with v = α_t²c² + σ_t².
    """
    grid = schedule.timesteps(num_steps)
    variance = (schedule.alpha(grid[:1]) * data_std) ** 2 + schedule.sigma(grid[:1]) ** 2
    for t, s in pairwise(grid[:, None]):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        scales = sampler.scales(schedule, t, s)
        slope = (scales.x0 * alpha * data_std**2 + scales.epsilon * sigma) / ((alpha * data_std) ** 2 + sigma**2)
        variance = slope**2 * variance + scales.std**2
    return float(variance.sqrt())


CLEAN = DiscreteVPSchedule(DDIMScheduler(**PROCESSES["stable_diffusion"]).alphas_cumprod.double(), ends_clean=True)


@pytest.mark.parametrize(
    ("sampler", "schedule", "bound"),
    [
        *((DDIM(eta), FlowSchedule(), 2e-3) for eta in (0.0, 0.5, 1.0)),
        *((FlowSDE(a), FlowSchedule(), 2e-3) for a in (0.3, 0.7)),
        *((DDIM(eta), CLEAN, 5e-3) for eta in (0.0, 0.5, 1.0)),  # 1,000 steps are all that it has
    ],
)
def test_ddim_and_flow_sde_reach_the_data_as_steps_get_finer(sampler, schedule, bound):
    coarse, fine = (abs(std_of_the_chain(sampler, schedule, n, data_std=0.5) - 0.5) for n in (10, 1000))
    assert fine < bound
    assert fine < coarse / 20


@pytest.mark.parametrize("sampler", [CPS(0.7), CPS(1.0), Consistency()], ids=repr)
@pytest.mark.parametrize("schedule", [FlowSchedule(), CLEAN], ids=["flow", "discrete"])
def test_cps_and_consistency_end_narrower_than_the_data(schedule, sampler):
    """Fresh noise in every step, however fine, is more than the process adds: x̂_0 falls towards the mean."""
    widths = [std_of_the_chain(sampler, schedule, num_steps, data_std=0.5) for num_steps in (10, 100, 1000)]
    assert max(widths[1:]) < 0.45


# Batches.


@pytest.mark.parametrize("sampler", [DDIM(), CPS(), Consistency(), FlowSDE()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_at_their_own_times_equal_samples_alone(sampler, dtype):
    schedule = FlowSchedule()
    t, s = torch.tensor([1.0, 0.51, 0.1], dtype=dtype), torch.tensor([0.9, 0.45, 0.0], dtype=dtype)
    x0, epsilon = seeded(SHAPE).to(dtype), seeded(SHAPE, seed=1).to(dtype)
    together = transition(x0, epsilon, sampler.scales(schedule, t, s))
    assert together.mean.dtype == together.std.dtype == dtype
    for lane in range(3):
        part = slice(lane, lane + 1)
        alone = transition(x0[part], epsilon[part], sampler.scales(schedule, t[part], s[part]))
        assert torch.equal(together.mean[part], alone.mean)
        assert torch.equal(together.std[part], alone.std)


@pytest.mark.parametrize("sampler", FAMILY, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_window_has_the_samplers_bits_inside_and_the_deterministic_steps_outside(sampler, dtype):
    grid = EMOJI.timesteps(10).to(dtype)
    t, s = grid[:-1], grid[1:]
    windowed = Windowed(sampler, noisy=float(t[2]), clean=float(t[5])).scales(EMOJI, t, s)
    inside, outside = sampler.scales(EMOJI, t, s), DDIM(0.0).scales(EMOJI, t, s)
    assert windowed.deterministic == inside.deterministic
    for name in ("x0", "epsilon", "std"):
        found = getattr(windowed, name)
        assert torch.equal(found[2:5], getattr(inside, name)[2:5])
        assert torch.equal(found[:2], getattr(outside, name)[:2])
        assert torch.equal(found[5:], getattr(outside, name)[5:])
    assert (windowed.std[[0, 1, 5]] == 0).all()


def test_lanes_outside_the_window_move_to_their_mean():
    t, shape = torch.tensor([0.9, 0.5, 0.3]), (3, 4)
    scales = Windowed(DDIM(1.0), noisy=0.6, clean=0.3).scales(FlowSchedule(), t, t / 2)
    step = transition(seeded(*shape).float(), seeded(*shape, seed=1).float(), scales)
    moved = (step.sample() != step.mean).any(1)
    assert moved.tolist() == [False, True, False]
    assert step.log_prob(step.mean)[[0, 2]].tolist() == [0.0, 0.0]


def test_whole_numbers_for_times_do_not_round_eta():
    t, s = torch.tensor([900, 500]), torch.tensor([850, 450])
    found, expected = (DDIM(0.5).scales(EMOJI, *times) for times in ((t, s), (t.float(), s.float())))
    assert torch.equal(found.std, expected.std)
    assert torch.equal(found.epsilon, expected.epsilon)


# Parts.


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_sampler_comes_back_from_its_description(sampler):
    assert made(described(sampler), Sampler) == sampler


def test_a_sampler_is_frozen_and_holds_plain_numbers():
    assert type(DDIM(np.float32(0.5)).eta) is float
    with pytest.raises(FrozenInstanceError):
        DDIM().eta = 0.5


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, True, "1"])
@pytest.mark.parametrize(("kind", "name"), [(DDIM, "eta"), (CPS, "nu")])
def test_shares_outside_their_range_are_refused(kind, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a finite number in \[0, 1\], got "):
        kind(value)


def test_other_wrong_arguments_of_samplers_are_refused():
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"a must be a finite number in \[0, inf\), got "):
            FlowSDE(value)
    with pytest.raises(TypeError, match="sampler must be a Sampler, such as DDIM"):
        Windowed(0.5, 1.0, 0.0)
    with pytest.raises(ValueError, match="clean must be a finite number"):
        Windowed(DDIM(), 1.0, math.nan)
