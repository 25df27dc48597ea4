"""The consistency function: its boundary, its closed form, and numerical integration as the reference."""

import math

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, LCMScheduler

from diffusion_gym.consistency_function import exact_consistency, latent_scalings, ve_scalings
from diffusion_gym.models import load_model
from diffusion_gym.schedules import KarrasSchedule

MEAN, STD, EPSILON = torch.tensor([1.0, -1.0], dtype=torch.float64), 0.5, 0.002


def gaussian_denoiser(x, sigma):
    return MEAN + STD**2 / (STD**2 + sigma**2)[:, None] * (x - MEAN)


def gaussian_consistency(x, sigma, end=EPSILON):
    return MEAN + ((STD**2 + end**2) / (STD**2 + sigma**2)).sqrt()[:, None] * (x - MEAN)


@pytest.fixture(scope="module")
def points():
    generator = torch.Generator().manual_seed(0)
    sigma = KarrasSchedule().timesteps(16)[:-1].repeat_interleave(16)
    return torch.randn(256, 2, generator=generator, dtype=torch.float64) * (1 + sigma[:, None]), sigma


def mixture_denoiser():
    denoiser = load_model("mixture").denoiser

    def denoise(x, sigma):
        return denoiser.posterior_mean(x, torch.ones_like(sigma), sigma, torch.ones(len(x), 8))

    return denoise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_function_is_the_identity_at_the_boundary(dtype):
    c_skip, c_out, _ = ve_scalings(torch.tensor([0.002], dtype=dtype))
    assert (float(c_skip), float(c_out)) == (1.0, 0.0)
    c_skip, c_out = latent_scalings(torch.tensor([0.0, -1.0], dtype=dtype))
    assert c_skip.tolist() == [1.0, 1.0]
    assert c_out.tolist() == [0.0, 0.0]


def test_scalings_are_diffusers():
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0])
    c_skip, c_out = CMStochasticIterativeScheduler().get_scalings_for_boundary_condition(sigma)
    ours = ve_scalings(sigma)
    torch.testing.assert_close(ours[0], c_skip)
    torch.testing.assert_close(ours[1], c_out, rtol=1e-5, atol=0)
    t = torch.tensor([0.0, 1.0, 50.0, 999.0])
    scheduler = LCMScheduler()
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(time) for time in t]
    torch.testing.assert_close(latent_scalings(t)[0], torch.stack([row[0] for row in expected]))
    torch.testing.assert_close(latent_scalings(t)[1], torch.stack([row[1] for row in expected]))


def test_integration_gives_a_gaussian_s_closed_form(points):
    x, sigma = points
    error = exact_consistency(gaussian_denoiser, x, sigma) - gaussian_consistency(x, sigma)
    assert error.norm(dim=1).max() < 1e-6


def test_the_closed_form_is_self_consistent(points):
    x, sigma = points
    nearer = EPSILON + 0.4 * (sigma - EPSILON)
    along = MEAN + ((STD**2 + nearer**2) / (STD**2 + sigma**2)).sqrt()[:, None] * (x - MEAN)
    torch.testing.assert_close(gaussian_consistency(along, nearer), gaussian_consistency(x, sigma), rtol=0, atol=1e-13)


def test_integration_of_the_mixture_is_exact_to_one_millionth_and_of_fourth_order(points):
    x, sigma = points
    denoise = mixture_denoiser()
    reference = exact_consistency(denoise, x, sigma, num_steps=1600)
    errors = {
        count: float((exact_consistency(denoise, x, sigma, num_steps=count) - reference).norm(dim=1).max())
        for count in (100, 200, 400)
    }
    assert errors[400] < 1e-6
    assert 3.5 < math.log2(errors[100] / errors[200]) < 4.5


def test_one_function_serves_a_variance_preserving_process(points):
    """x_t/α_t at σ_t/α_t: the VP denoiser of x_t is the VE denoiser there."""
    model = load_model("mixture")
    t = torch.tensor([100.0, 500.0, 900.0], dtype=torch.float64)
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    x = points[0][:3]
    ones = torch.ones(3, 8)
    preserving = model.denoiser.posterior_mean(x, alpha, sigma, ones)
    exploding = mixture_denoiser()(x / alpha[:, None], sigma / alpha)
    torch.testing.assert_close(preserving, exploding)
