import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch.distributions import Normal, kl_divergence

from diffusion_gym.predictions import to_x0_and_epsilon
from diffusion_gym.schedules import DiscreteVPSchedule, FlowSchedule
from diffusion_gym.transitions import (
    GaussianTransition,
    consistency_transition,
    cps_transition,
    ddim_transition,
    draw_noise,
)

from .test_schedules import PROCESSES

SHAPE = (3, 4, 8, 8)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_float64(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.as_tensor(scheduler.final_alpha_cumprod).double()
    return scheduler


@pytest.mark.parametrize("ends_clean", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("process", PROCESSES)
def test_ddim_transition_matches_diffusers(process, prediction_type, eta, ends_clean):
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
    grid = schedule.timesteps(20)
    latents, output, noise = seeded(SHAPE), seeded(SHAPE, seed=1), seeded(SHAPE, seed=2)
    for t, s in pairwise(grid):
        expected = scheduler.step(output, int(t), latents, eta=eta, variance_noise=noise if eta else None)
        batch_t, batch_s = t.expand(3), s.expand(3)
        x0, epsilon = to_x0_and_epsilon(
            output,
            latents,
            alpha=schedule.alpha(batch_t),
            sigma=schedule.sigma(batch_t),
            prediction_type=prediction_type,
        )
        step = ddim_transition(x0, epsilon, schedule=schedule, t=batch_t, s=batch_s, eta=eta)
        moved = step.mean + step.std[:, None, None, None] * noise
        scale = expected.pred_original_sample.abs().max()
        torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-11, atol=0)
        assert (moved - expected.prev_sample).abs().max() / scale < 2e-13


def test_ddim_transition_on_a_flow_matches_euler():
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
        mean = ddim_transition(x0, epsilon, schedule=schedule, t=t, s=s, eta=0.0).mean
        torch.testing.assert_close(mean, expected, rtol=1e-14, atol=1e-14)


def test_consistency_transition_matches_lcm():
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_scaling=1e9, clip_sample=False
    )
    scheduler.set_timesteps(4)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = DiscreteVPSchedule(scheduler.alphas_cumprod)
    latents, output = seeded(SHAPE), seeded(SHAPE, seed=1)
    timesteps = scheduler.timesteps
    for t, s in pairwise(timesteps):
        expected = scheduler.step(output, t, latents, generator=torch.Generator().manual_seed(7))
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        alpha, sigma = schedule.alpha(t.expand(3).double()), schedule.sigma(t.expand(3).double())
        x0, _ = to_x0_and_epsilon(output, latents, alpha=alpha, sigma=sigma, prediction_type="epsilon")
        step = consistency_transition(x0, schedule=schedule, s=s.expand(3).double())
        moved = step.mean + step.std[:, None, None, None] * noise
        torch.testing.assert_close(moved, expected.prev_sample, rtol=1e-12, atol=1e-12)


def test_cps_transition_is_the_published_formula():
    t, s, nu = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.7, 0.4, 0.05]).double(), 0.7
    latents, velocity, schedule = seeded(SHAPE), seeded(SHAPE, seed=1), FlowSchedule()
    sigma, sigma_next = t[:, None, None, None], s[:, None, None, None]
    std = sigma_next * math.sin(nu * math.pi / 2)
    image, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
    expected = image * (1 - sigma_next) + noise * (sigma_next**2 - std**2).sqrt()
    x0, epsilon = to_x0_and_epsilon(velocity, latents, alpha=1 - t, sigma=t, prediction_type="flow")
    step = cps_transition(x0, epsilon, schedule=schedule, s=s, nu=nu)
    torch.testing.assert_close(step.mean, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step.std, std.flatten(), rtol=1e-12, atol=0)


def test_noise_level_after_any_step_is_that_of_the_process():
    """E over a perfect model: x_s has signal α_s and noise σ_s whatever the std."""
    schedule = DiscreteVPSchedule(DDIMScheduler(**PROCESSES["emoji"]).alphas_cumprod)
    t, s = torch.tensor([800.0, 300.5, 2.0]).double(), torch.tensor([750.0, 100.0, 0.0]).double()
    one = torch.ones(3, 1, dtype=torch.float64)
    for eta in (0.0, 0.3, 1.0):
        noise_part = ddim_transition(0 * one, one, schedule=schedule, t=t, s=s, eta=eta)
        total = noise_part.mean.flatten() ** 2 + noise_part.std**2
        torch.testing.assert_close(total.sqrt(), schedule.sigma(s), rtol=1e-12, atol=0)


def test_samples_at_their_own_times_equal_samples_alone():
    schedule = DiscreteVPSchedule(DDIMScheduler(**PROCESSES["emoji"]).alphas_cumprod)
    t, s = torch.tensor([951.0, 501.0, 1.0]), torch.tensor([901.0, 451.0, 0.0])
    x0, epsilon = seeded(SHAPE).float(), seeded(SHAPE, seed=1).float()
    together = ddim_transition(x0, epsilon, schedule=schedule, t=t, s=s)
    for i in range(3):
        one = slice(i, i + 1)
        alone = ddim_transition(x0[one], epsilon[one], schedule=schedule, t=t[one], s=s[one])
        assert torch.equal(together.mean[one], alone.mean)
        assert torch.equal(together.std[one], alone.std)


def test_log_prob_and_kl_are_those_of_torch_normal():
    mean, other_mean, value = seeded(SHAPE), seeded(SHAPE, seed=1), seeded(SHAPE, seed=2)
    std, other_std = torch.tensor([0.02, 0.4, 1.0]).double(), torch.tensor([0.03, 0.4, 0.5]).double()
    transition, other = GaussianTransition(mean, std), GaussianTransition(other_mean, other_std)
    normal = Normal(mean, std[:, None, None, None])
    other_normal = Normal(other_mean, other_std[:, None, None, None])
    expected = normal.log_prob(value).flatten(1)
    torch.testing.assert_close(transition.log_prob(value), expected.sum(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(transition.log_prob(value, reduction="mean"), expected.mean(1), rtol=1e-13, atol=0)
    divergence = kl_divergence(normal, other_normal).flatten(1).sum(1)
    torch.testing.assert_close(transition.kl(other), divergence, rtol=1e-13, atol=0)
    assert torch.equal(transition.kl(transition), torch.zeros(3, dtype=torch.float64))


def test_sample_has_the_mean_and_std_of_the_transition():
    mean, std = seeded(1, 4, 1, 1).expand(2, 4, 200, 200), torch.tensor([0.1, 2.0]).double()
    sample = GaussianTransition(mean, std).sample(torch.Generator().manual_seed(0))
    error = (sample - mean).flatten(1)
    assert (error.mean(1).abs() < 4 * std / 400).all()
    torch.testing.assert_close(error.std(1), std, rtol=0.01, atol=0)


def test_deterministic_transition_samples_its_mean_and_has_no_density():
    schedule = FlowSchedule()
    x0, epsilon, t = seeded(SHAPE), seeded(SHAPE, seed=1), torch.full((3,), 0.5)
    step = ddim_transition(x0, epsilon, schedule=schedule, t=t, s=t / 2, eta=0.0)
    assert torch.equal(step.sample(), step.mode)
    with pytest.raises(ValueError, match="eta > 0"):
        step.log_prob(step.mean)
    with pytest.raises(ValueError, match="eta > 0"):
        step.kl(step)


def test_lanes_that_reach_the_clean_end_score_zero_and_give_no_gradient():
    mean = seeded(2, 4).requires_grad_()
    transition = GaussianTransition(mean, torch.tensor([0.0, 0.5]).double())
    log_prob = transition.log_prob(mean.detach() + 0.1)
    assert log_prob[0] == 0
    log_prob.sum().backward()
    assert (mean.grad[0] == 0).all()
    assert (mean.grad[1] != 0).all()
    assert torch.isfinite(mean.grad).all()


def test_lane_generators_make_the_noise_of_a_lane_independent_of_the_batch():
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    whole = draw_noise(torch.empty(4, 2, 3), generators())
    part = draw_noise(torch.empty(2, 2, 3), generators()[1:3])
    assert torch.equal(whole[1:3], part)
    with pytest.raises(ValueError, match="one per sample: got 4 for a batch of 3"):
        draw_noise(torch.empty(3, 2), generators())


def test_every_sample_may_have_its_own_eta():
    generator = torch.Generator().manual_seed(0)
    x0, epsilon = torch.randn(2, 3, 4, generator=generator)
    t, etas = torch.full((3,), 0.5), torch.tensor([0.0, 0.3, 1.0])
    step = ddim_transition(x0, epsilon, schedule=FlowSchedule(), t=t, s=t / 2, eta=etas)
    for lane, eta in enumerate(etas):
        alone = ddim_transition(x0, epsilon, schedule=FlowSchedule(), t=t, s=t / 2, eta=float(eta))
        torch.testing.assert_close(step.mean[lane], alone.mean[lane])
        torch.testing.assert_close(step.std[lane], alone.std[lane])
    assert torch.equal(step.sample()[0], step.mean[0])


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_outside_its_range_is_refused(eta):
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=rf"eta must be in \[0, 1\], got {eta}"):
        ddim_transition(one, one, schedule=FlowSchedule(), t=one[0], s=one[0] / 2, eta=eta)
    with pytest.raises(ValueError, match=r"nu must be in \[0, 1\]"):
        cps_transition(one, one, schedule=FlowSchedule(), s=one[0], nu=eta)
    with pytest.raises(ValueError, match='"sum" or "mean"'):
        GaussianTransition(one, one[0]).log_prob(one, reduction="max")


def test_steps_that_are_certain_on_both_sides_diverge_by_nothing_and_give_no_gradient():
    mean = seeded(2, 4).requires_grad_()
    one = GaussianTransition(mean, torch.tensor([0.0, 0.5]).double())
    other = GaussianTransition(seeded(2, 4, seed=1), torch.tensor([0.0, 0.5]).double())
    divergence = one.kl(other)
    assert divergence[0] == 0
    assert divergence[1] > 0
    divergence.sum().backward()
    assert (mean.grad[0] == 0).all()
    assert torch.isfinite(mean.grad).all()
    assert (mean.grad[1] != 0).all()
