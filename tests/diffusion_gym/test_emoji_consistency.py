"""The few-step sibling of the embedded model."""

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from diffusion_gym.models import load_model
from diffusion_gym.rewards import make_reward
from diffusion_gym.sampling import sample_latents
from diffusion_gym.transitions import draw_noise

ANIMALS = ["a cat", "a lion", "a fox", "a frog", "a pig", "a bear"]


@pytest.fixture(scope="module")
def model():
    return load_model("emoji_consistency")


def draw(model, prompts, *, num_steps):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    noise = draw_noise(torch.empty(len(prompts), *model.latent_shape), generators)
    times = model.schedule.timesteps(num_steps)
    conditioning = model.encode_prompts(prompts)
    sampler = model.default_sampler
    latents = sample_latents(model, noise, conditioning, times, sampler=sampler, generators=generators)
    return model.decode(latents)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_plain_diffusers_draws_the_same(model, num_steps):
    pipeline = LatentConsistencyModelPipeline.from_pretrained(model.path)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        ANIMALS[:2],
        num_inference_steps=num_steps,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        output_type="pt",
    ).images
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
    torch.testing.assert_close(draw(model, ANIMALS[:2], num_steps=num_steps), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_it_draws_what_it_is_asked_for(model, num_steps):
    images = draw(model, ANIMALS, num_steps=num_steps)
    reward = make_reward("emoji_alignment")
    scores = torch.stack([reward(images, [animal] * len(ANIMALS)).values for animal in ANIMALS])
    assert (scores.argmax(0) == torch.arange(len(ANIMALS))).float().mean() > 0.6


def test_the_guidance_is_folded_in(model):
    """It is told a scale, as its pipeline's class has it, and does not listen."""
    x, t, conditioning = torch.randn(2, 4, 16, 16), torch.full((2,), 399.0), model.encode_prompts(ANIMALS[:2])
    with torch.no_grad():
        first, second = (model.denoise(x, t, conditioning, guidance_scale=scale).x0 for scale in (1.0, 8.0))
    assert torch.equal(first, second)


def test_it_starts_as_a_consistency_function(model):
    x = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        f = model.denoise(x, torch.zeros(2), model.encode_prompts(ANIMALS[:2]), guidance_scale=4.0).x0
    assert torch.equal(f, x)
