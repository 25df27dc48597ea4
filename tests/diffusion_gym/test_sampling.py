"""Sampling without an environment: the samplers' own steps one after the other, and corrected predictions."""

from itertools import pairwise

import pytest
import torch

from diffusion_gym.predictions import broadcast_to
from diffusion_gym.samplers import CPS, DDIM, Consistency
from diffusion_gym.sampling import sample_latents
from diffusion_gym.transitions import transition


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


@pytest.fixture
def noise(tiny):
    return torch.randn(2, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sampler", [DDIM(0.0), DDIM(1.0), CPS(0.3), Consistency()], ids=repr)
def test_the_steps_are_the_samplers(tiny, noise, sampler):
    conditioning, times = tiny.encode_prompts(["a cat", "a dog"]), tiny.schedule.timesteps(3)
    expected, draws = noise, generators()
    with torch.no_grad():
        for t, s in pairwise(times.float()):
            at = (t.expand(2), s.expand(2))
            prediction = tiny.denoise(expected, at[0], conditioning, guidance_scale=3.0)
            scales = sampler.scales(tiny.schedule, *at)
            expected = transition(prediction.x0, prediction.epsilon, scales).sample(draws)
    options = {"sampler": sampler, "generators": generators(), "guidance_scale": 3.0}
    assert torch.equal(sample_latents(tiny, noise, conditioning, times, **options), expected)
    unchanged = sample_latents(tiny, noise, conditioning, times, correct=lambda pred_x0: pred_x0, **{
        **options, "generators": generators()
    })  # fmt: skip
    torch.testing.assert_close(unchanged, expected, rtol=1e-4, atol=1e-4)


def test_a_corrected_prediction_takes_its_noise_with_it(tiny, noise):
    """With DDIM(0) the path to a constant x_0 is x_t = α_t·x_0 + σ_t·ε with one ε all along."""
    times = torch.tensor([900.0, 500.0, 100.0])
    end = sample_latents(tiny, noise, tiny.encode_prompts(["a cat"] * 2), times, correct=lambda x0: torch.ones_like(x0))
    t, s = times[:1], times[-1:]
    alpha_t, sigma_t, alpha_s, sigma_s = (
        broadcast_to(level(time), noise) for time in (t, s) for level in (tiny.schedule.alpha, tiny.schedule.sigma)
    )
    torch.testing.assert_close(end, alpha_s + sigma_s * (noise - alpha_t) / sigma_t, rtol=1e-4, atol=1e-4)
