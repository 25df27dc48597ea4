"""The flow-matching sibling of the embedded model."""

import gymnasium as gym
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DenoisingPolicy, Rollouts
from diffusion_gym.models import load_model
from diffusion_gym.rewards import make_reward
from diffusion_gym.samplers import CPS, DDIM, FlowSDE
from diffusion_gym.sampling import sample_latents
from diffusion_gym.transitions import draw_noise

PROMPTS = ["a cat", "a fox on a blue background"]


@pytest.fixture(scope="module")
def model():
    return load_model("emoji_flow")


def draw(model, prompts, *, num_steps):
    noise = draw_noise(torch.empty(len(prompts), *model.latent_shape), torch.Generator().manual_seed(0))
    times = model.schedule.timesteps(num_steps)
    return noise, model.decode(sample_latents(model, noise, model.encode_prompts(prompts), times))


@pytest.mark.parametrize("rows_of_zeros", [0, 16])
def test_plain_diffusers_draws_the_same(model, rows_of_zeros):
    """The fewest rows of zeros that its pipeline puts in T5's place are what is loaded; some more change little."""
    noise, images = draw(model, PROMPTS, num_steps=6)
    pipeline = StableDiffusion3Pipeline.from_pretrained(model.path, text_encoder_3=None, tokenizer_3=None)
    pipeline.to(torch.float32).set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS,
        latents=noise,
        height=64,
        width=64,
        num_inference_steps=6,
        guidance_scale=model.default_guidance_scale,
        max_sequence_length=rows_of_zeros,
        output_type="pt",
    ).images
    difference = (images - expected).abs()
    assert difference.max() < 1e-3 if rows_of_zeros == 0 else difference.mean() < 0.05


def test_it_draws_what_it_is_asked_for(model):
    animals = ["a cat", "a lion", "a fox", "a frog", "a pig", "a bear"]
    _, images = draw(model, animals, num_steps=12)
    reward = make_reward("emoji_alignment")
    scores = torch.stack([reward(images, [animal] * len(animals)).values for animal in animals])
    assert (scores.argmax(0) == torch.arange(len(animals))).float().mean() > 0.6


@pytest.mark.parametrize("sampler", [DDIM(1.0), FlowSDE(0.7), CPS(0.8)])
def test_a_denoising_policy_learns_with_each_stochastic_sampler(model, sampler):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=4, model=model, reward="brightness")
    policy = DenoisingPolicy(model, sampler=sampler, seed=0)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    DDPOIS(policy, env, batch_size=4, rollouts=Rollouts(samples=4), seed=0).learn(16, log_interval=0)
    assert any(not torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))
    assert all(bool(torch.isfinite(parameter).all()) for parameter in policy.parameters())
