"""What is a latent consistency model's own: its times, the boundary at t = 0, the guidance that it is told."""

import shutil
import warnings
from pathlib import Path

import gymnasium as gym
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DenoisingPolicy, LoRA
from diffusion_gym.models import load_model
from diffusion_gym.models.latent_consistency import guidance_embedding
from diffusion_gym.predictions import broadcast_to
from diffusion_gym.samplers import Consistency
from tests.diffusion_gym.models.test_folders import change
from tests.diffusion_gym.test_lora_files import FILE, as_if_trained
from tests.families import open_pipeline
from tests.tiny import make_tiny_latent_consistency

PROMPTS = ["a cat", "an ant on a pink background"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_tiny_latent_consistency(tmp_path_factory.mktemp("lcm") / "tiny")


@pytest.fixture(scope="module")
def pipeline(original):
    return open_pipeline(original)


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_an_episode_ends_with_the_pipelines_image(original, pipeline, num_steps):
    """By default: in the environment, by the policy's sampler and guidance, from the same noises."""
    env = gym.make_vec(
        "DenoisingMDP-v0", num_envs=2, num_steps=num_steps, model=original, prompts=PROMPTS, reward="brightness",
        autoreset_mode="DISABLED", image_size=(16, 24),
    )  # fmt: skip
    policy = DenoisingPolicy(env.unwrapped.model)
    assert policy.sampler == Consistency()
    observation, info = env.reset(seed=0)
    prompts = [PROMPTS[index] for index in observation["prompt_id"][:, 0]]
    noise, draws, scored = observation["latents"].clone(), generators(), []
    for _ in range(num_steps):
        scored.append(policy.scored(info).tolist())
        with torch.no_grad():
            action = policy.distribution(observation).sample(draws)
        observation, _, _, _, info = env.step(action)
    expected = pipeline(
        prompts, latents=noise, generator=generators(), num_inference_steps=num_steps, height=16, width=24,
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(info["images"], expected, atol=1e-4, rtol=0)
    assert scored == [[True, True]] * (num_steps - 1) + [[False, False]]


def test_the_prediction_is_the_consistency_function(original):
    model = load_model(original)
    conditioning, latents = model.encode_prompts(["a cat"] * 5), torch.randn(5, *model.latent_shape)
    t = torch.tensor([-1.0, 0.0, 0.02, 19.0, 999.0])
    with torch.no_grad():
        prediction = model.denoise(latents, t, conditioning, guidance_scale=8.5)
        output = model._model_output(model.denoiser, latents, t, conditioning, 8.5)
    assert torch.equal(prediction.x0[:2], latents[:2])
    assert torch.equal(prediction.epsilon[0], torch.zeros_like(latents[0]))
    alpha, sigma = (broadcast_to(level(t), latents) for level in (model.schedule.alpha, model.schedule.sigma))
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.epsilon, latents)
    plain = (latents - sigma * output) / alpha  # 0.02·10 = 0.2, of 0.5
    half_way = 0.25 / 0.29 * latents[2] + 0.2 / 0.29**0.5 * plain[2]
    torch.testing.assert_close(prediction.x0[2], half_way)
    torch.testing.assert_close(prediction.x0[3:], plain[3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [4, 7, 256])
@pytest.mark.parametrize("scale", [0.5, 1.0, 8.5])
def test_the_guidance_embedding_is_the_pipelines(pipeline, scale, size):
    expected = pipeline.get_guidance_scale_embedding(torch.tensor([scale - 1]), embedding_dim=size)
    assert torch.equal(guidance_embedding(scale, size), expected[0])


def test_the_guidance_scale_has_an_effect_in_one_pass_without_negative_prompt(original):
    model = load_model(original)
    latents, t = torch.randn(1, *model.latent_shape), torch.tensor([999.0])
    conditioning = model.encode_prompts(["a cat"])
    assert set(conditioning) == {"prompt_embeds"}
    with torch.no_grad():
        one, other = (model.denoise(latents, t, conditioning, guidance_scale=scale).x0 for scale in (1.0, 8.5))
    assert (one - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="negative_prompt='dark' has no effect"):
        model.encode_prompts(["a cat"], "dark")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet/config.json", {"time_cond_proj_dim": ...}, "time_cond_proj_dim must be a whole number of at least 4"),
        ("unet/config.json", {"time_cond_proj_dim": 2}, "time_cond_proj_dim must be a whole number of at least 4"),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, "clip_sample must be False .* set it to false"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding must be False"),
        ("scheduler/scheduler_config.json", {"timestep_scaling": 0}, "timestep_scaling must be a number above 0"),
        ("scheduler/scheduler_config.json", {"original_inference_steps": 0}, "original_inference_steps must be"),
        ("scheduler/scheduler_config.json", {"original_inference_steps": 1001}, r"between 1 and 1000, got 1001"),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "allowed are LCMScheduler"),
    ],
)
def test_what_is_not_understood_is_refused(folder, file, values, message):
    change(folder / file, **values)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_latent_consistency_model_in_another_pipelines_folder_is_told_its_own(folder):
    scheduler = ["diffusers", "DDIMScheduler"]
    change(folder / "model_index.json", _class_name="StableDiffusionPipeline", scheduler=scheduler)
    with pytest.raises(ValueError, match=r"time_cond_proj_dim must be None .* LatentConsistencyModelPipeline"):
        load_model(folder)


def test_the_folders_scaling_and_steps_are_read(folder):
    change(folder / "scheduler" / "scheduler_config.json", timestep_scaling=0.01, original_inference_steps=20)
    model = load_model(folder)
    assert model.schedule.timesteps(2).tolist() == [999.0, 499.0, -1.0]
    t, one = torch.full((1,), 50.0), torch.ones(1)
    x0, _ = model.to_x0_and_epsilon(torch.zeros(1), one, t)  # 0.01·50 = σ_d
    torch.testing.assert_close(x0, 0.5 + 0.5**0.5 / model.schedule.alpha(t))
    with pytest.raises(ValueError, match="num_steps must be between 1 and 20, got 21"):
        model.schedule.timesteps(21)


@pytest.mark.parametrize("targets", [("to_k", "conv1", "proj_in"), ("to_k", "cond_proj", "proj_out")])
def test_a_lora_file_is_whole_in_the_plain_pipeline_whatever_its_targets(original, tmp_path, targets):
    model = load_model(original)
    policy = as_if_trained(DenoisingPolicy(model, adaptation=LoRA(alpha=6, targets=targets), seed=0))
    policy.save(tmp_path)
    pipeline = open_pipeline(original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and diffusers talk about missing text-encoder layers
        pipeline.load_lora_weights(tmp_path, weight_name=FILE)
    latents, t, conditioning = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), model.encode_prompts(["a cat"])
    with torch.no_grad():
        ours, theirs, plain = (
            model.denoise(latents, t, conditioning, guidance_scale=8.5, denoiser=denoiser).x0
            for denoiser in (policy.denoiser, pipeline.unet, None)
        )
    assert float((ours - plain).norm() / plain.norm()) > 0.01
    assert torch.equal(ours, theirs)
