"""Every algorithm trains every family of models, and what is saved opens in the family's plain pipeline."""

import pickle
import warnings

import gymnasium as gym
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    GRPO,
    KL,
    RLOO,
    RWR,
    DenoisingPolicy,
    DiffusionNFT,
    Full,
    Groups,
    LoRA,
    Rollouts,
    Steps,
    TimePredictor,
    Window,
)
from diffusion_gym.models import load_model
from diffusion_gym.samplers import CPS, FlowSDE
from diffusion_gym.transitions import draw_noise
from tests.families import FAMILIES, open_pipeline

PROMPTS = ["a cat", "a fox"]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return family.write(tmp_path_factory.mktemp(family.name) / "model")


@pytest.fixture(scope="module")
def model(family, folder):
    return load_model(folder, image_size=family.told_size)


def trained(algorithm):
    """Whether learning changed the trained weights and left them finite."""
    before = [parameter.detach().clone() for parameter in algorithm.policy.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random model's rewards may be ties
        algorithm.learn(algorithm.sizes.samples * (algorithm.env.unwrapped.num_steps or 2), log_interval=0)
    after = [parameter for parameter in algorithm.policy.parameters() if parameter.requires_grad]
    assert all(bool(torch.isfinite(parameter).all()) for parameter in after)
    return any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("adaptation", [Full(), LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("algorithm", [DDPOIS, RLOO, GRPO, RWR, DiffusionNFT])
def test_one_update_of_each_algorithm(family, model, algorithm, precision, adaptation):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=2, model=model, reward="brightness")
    policy = DenoisingPolicy(
        model, adaptation=adaptation, precision=precision, guidance_scale=family.guidance_scale, seed=0
    )
    learner = algorithm(
        policy, env, learning_rate=1e-2, batch_size=4, rollouts=Rollouts(samples=4, group_size=4), seed=0
    )
    assert trained(learner)
    pickle.dumps(model)  # refused, if a weight of the shared model was written to


def test_lora_over_weights_in_half_precision(family, folder):
    model = load_model(folder, dtype="bfloat16", image_size=family.told_size)
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=2, model=model, reward="brightness")
    policy = DenoisingPolicy(
        model,
        adaptation=LoRA(rank=2),
        guidance_scale=family.guidance_scale,
        gradient_checkpointing=True,
        seed=0,
    )
    rollouts = Rollouts(samples=4, group_size=4)
    assert trained(GRPO(policy, env, learning_rate=1e-2, batch_size=4, rollouts=rollouts, seed=0))


def test_one_update_of_a_time_predictor(family, model):
    env = gym.make_vec(
        "TimePredictionMDP-v0",
        num_envs=4,
        max_steps=3,
        model=model,
        reward="brightness",
        guidance_scale=family.guidance_scale,
        autoreset_mode="DISABLED",
    )
    policy = TimePredictor(env.single_observation_space, seed=0)
    learner = RLOO(
        policy, env, learning_rate=1e-2, rollouts=Rollouts(group_size=4, same_noise=True), advantages=Groups(), seed=0
    )
    assert trained(learner)


@pytest.mark.parametrize("adaptation", [Full(), LoRA(rank=2, alpha=4.0)], ids=["full", "lora"])
def test_what_is_saved_draws_the_same_image_in_the_plain_pipeline(family, folder, model, adaptation, tmp_path):
    policy = DenoisingPolicy(
        model, sampler=family.sampler, adaptation=adaptation, guidance_scale=family.guidance_scale, seed=0
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    policy.save(tmp_path)
    noise = draw_noise(torch.empty(2, *model.latent_shape), torch.Generator().manual_seed(0))
    images = family.sample(model, PROMPTS, noise, num_steps=3, denoiser=policy.denoiser)
    assert (images - family.sample(model, PROMPTS, noise, num_steps=3)).abs().max() > 1e-3
    pipeline = open_pipeline(folder)
    if isinstance(adaptation, LoRA):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft and diffusers talk about missing text-encoder layers
            pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    else:
        name = model.denoiser_folder
        pipeline.register_modules(**{name: type(model.denoiser).from_pretrained(tmp_path / name)})
    expected = family.draw(folder, PROMPTS, noise, num_steps=3, pipeline=pipeline, image_size=model.image_size)
    torch.testing.assert_close(images, expected, atol=2e-4, rtol=0)


def test_a_saved_policy_comes_back_the_same(family, model, tmp_path):
    policy = DenoisingPolicy(model, adaptation=LoRA(rank=2), seed=0)
    policy.save(tmp_path)
    again = DenoisingPolicy.load(tmp_path)
    assert again.model.image_size == model.image_size
    for first, second in zip(policy.denoiser.parameters(), again.denoiser.parameters(), strict=True):
        assert torch.equal(first, second)


def test_gradient_checkpointing_changes_no_gradient(family, model):
    conditioning = model.encode_prompts(PROMPTS)
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t = model.schedule.timesteps(4)[1:3].float()

    def gradients(is_checkpointed):
        policy = DenoisingPolicy(model, gradient_checkpointing=is_checkpointed, seed=0)
        prediction = model.denoise(
            latents, t, conditioning, guidance_scale=family.guidance_scale, denoiser=policy.denoiser.train()
        )
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        return torch.autograd.grad(prediction.x0.square().sum(), trained, allow_unused=True)

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        if plain is not None:
            torch.testing.assert_close(checkpointed, plain)


def test_flow_grpo_trains_flows_with_its_samplers(family, model):
    """Its settings, and those of its fast variant, as `agents.grpo` names them; FlowSDE is a sampler of flows alone."""
    num_steps = 4
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=num_steps, model=model, reward="brightness")
    if not model.schedule.is_flow:
        with pytest.raises(ValueError, match="FlowSDE is a sampler of rectified flows"):
            DenoisingPolicy(model, sampler=FlowSDE(0.7))
    for sampler in (FlowSDE(0.7), CPS(0.7)) if model.schedule.is_flow else (CPS(0.7),):
        for steps in (Steps(), Steps(window=Window(2))):
            policy = DenoisingPolicy(
                model, sampler=sampler, adaptation=LoRA(rank=2), guidance_scale=family.guidance_scale, seed=0
            )
            learner = GRPO(
                policy,
                env,
                learning_rate=1e-2,
                batch_size=4,
                kl=KL(0.04 / num_steps),
                steps=steps,
                rollouts=Rollouts(samples=4, group_size=4),
                seed=0,
            )
            assert trained(learner)
