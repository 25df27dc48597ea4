"""The solvers: Euler's step is DDIM's, and the chain of steps that distillation learns has the order of theorem 1."""

import math
from itertools import pairwise

import pytest
import torch

from agents.consistency import Euler, Heun
from agents.consistency.times import karras_levels
from diffusion_gym.consistency_function import exact_consistency
from diffusion_gym.models import load_model
from diffusion_gym.samplers import DDIM
from diffusion_gym.schedules import KarrasSchedule
from diffusion_gym.transitions import transition


def predict_of(model, conditioning):
    def predict(x, t):
        prediction = model.denoise(x, t, conditioning, guidance_scale=1.0)
        return prediction.x0, prediction.epsilon

    return predict


def test_euler_is_ddim():
    model = load_model("mixture")
    conditioning = model.encode_prompts(["anything"] * 3)
    x, t, s = torch.randn(3, 2, 1, 1), torch.tensor([900.0, 500.0, 20.0]), torch.tensor([850.0, 100.0, -1.0])
    prediction = model.denoise(x, t, conditioning, guidance_scale=1.0)
    expected = transition(prediction.x0, prediction.epsilon, DDIM(0.0).scales(model.schedule, t, s)).mean
    torch.testing.assert_close(Euler().step(predict_of(model, conditioning), x, t, s, model.schedule), expected)


def test_heun_to_the_clean_end_is_euler():
    model = load_model("mixture")
    predict = predict_of(model, model.encode_prompts(["anything"]))
    x, t, s = torch.randn(1, 2, 1, 1), torch.tensor([20.0]), torch.tensor([-1.0])
    torch.testing.assert_close(Heun().step(predict, x, t, s, model.schedule), predict(x, t)[0], rtol=1e-4, atol=1e-5)


def test_one_step_serves_a_variance_preserving_process_as_it_does_the_exploding_one(gaussian):
    """A step of x_t from t to s is one of x_t/α_t from σ_t/α_t to σ_s/α_s."""
    model = load_model("mixture")
    ones = torch.ones(1, 8)
    t, s = torch.tensor([700.0], dtype=torch.float64), torch.tensor([400.0], dtype=torch.float64)
    x = torch.tensor([[0.3, -0.8]], dtype=torch.float64)

    def of(schedule):
        def predict(x, t):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            x0 = model.denoiser.posterior_mean(x, alpha, sigma, ones)
            return x0, (x - alpha[:, None] * x0) / sigma[:, None]

        return predict

    preserving, exploding = model.schedule, KarrasSchedule()
    tau_t, tau_s = preserving.noise_ratio(t), preserving.noise_ratio(s)
    for solver in (Euler(), Heun()):
        step = solver.step(of(preserving), x, t, s, preserving) / preserving.alpha(s)[:, None]
        same = solver.step(of(exploding), x / preserving.alpha(t)[:, None], tau_t, tau_s, exploding)
        torch.testing.assert_close(step, same)


@pytest.mark.parametrize(("solver", "low", "high"), [(Euler(), 0.9, 1.1), (Heun(), 1.9, 2.3)])
@pytest.mark.parametrize("plane", ["gaussian", "circle"])
def test_the_error_falls_with_the_solver_s_order(request, plane, solver, low, high):
    """Theorem 1: distillation's minimiser is the chain of steps, whose error is O((Δt)^p)."""
    plane, schedule = request.getfixturevalue(plane), KarrasSchedule()
    noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = plane.data.latents[:256].flatten(1).double() + 80 * noise
    top = torch.full((256,), 80.0, dtype=torch.float64)

    def predict(x, sigma):
        x0 = plane.denoise(x, sigma)
        return x0, (x - x0) / sigma[:, None]

    reference = exact_consistency(plane.denoise, start, top)
    errors = {}
    for num_levels in (41, 81):
        x, levels = start, karras_levels(schedule, 0.002, num_levels).flip(0)
        for t, s in pairwise(levels):
            x = solver.step(predict, x, t.expand(256), s.expand(256), schedule)
        errors[num_levels] = float((x - reference).square().sum(1).mean().sqrt())
    assert low < math.log2(errors[41] / errors[81]) < high
