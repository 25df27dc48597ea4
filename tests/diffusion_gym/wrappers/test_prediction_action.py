"""With the denoiser's output as the action, the environment takes the sampler's step."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import diffusion_gym  # noqa: F401
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import write_mixture
from diffusion_gym.samplers import DDIM
from diffusion_gym.sampling import sample_latents
from diffusion_gym.testing import check_vector_env
from diffusion_gym.wrappers import PredictionAction
from tests.diffusion_gym.testing.walk import Walk

MODES = list(AutoresetMode)
NUM_STEPS = 5


def make(model="mixture", mode=AutoresetMode.SAME_STEP, num_envs=3):
    return gym.make_vec(
        "DenoisingMDP-v0", num_envs=num_envs, model=model, num_steps=NUM_STEPS, reward="brightness", autoreset_mode=mode
    )


@pytest.fixture(scope="session")
def flow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    means, names = [[-1.0, 0.0], [1.0, 0.0]], ["left", "right"]
    return load_model(write_mixture(folder, means, stds=[0.3, 0.3], names=names, scheduler=scheduler))


def predict(env, observation):
    """Return the frozen denoiser's output."""
    model = env.unwrapped.model
    texts = [env.unwrapped.prompts[int(index)] for index in observation["prompt_id"][:, 0]]
    conditioning = model.encode_prompts(texts)
    with torch.no_grad():
        return model._model_output(
            model.denoiser, observation["latents"], observation["timestep"][:, 0], conditioning, 1.0
        ), conditioning


@pytest.mark.parametrize("family", ["mixture", "flow"])
def test_the_models_own_output_samples_its_images(family, request):
    model = request.getfixturevalue(family)
    env = PredictionAction(make(model), DDIM(0.0))
    observation, _ = env.reset(seed=0)
    noise = observation["latents"]
    for _ in range(NUM_STEPS):
        action, conditioning = predict(env, observation)
        observation, *_, info = env.step(action)
    expected = sample_latents(model, noise, conditioning, model.schedule.timesteps(NUM_STEPS))
    torch.testing.assert_close(info["final_obs"]["latents"], expected, rtol=1e-5, atol=1e-5)


def test_the_noise_has_the_samplers_deviation(mixture):
    env = PredictionAction(make(num_envs=512))
    observation, _ = env.reset(seed=0, options={"latents": torch.ones(2, 1, 1)})
    t, s = observation["timestep"][:, 0], observation["next_timestep"][:, 0]
    observation, *_ = env.step(torch.zeros(512, 2, 1, 1))
    std = mixture.default_sampler.scales(mixture.schedule, t, s).std[0]
    assert observation["latents"].std().item() == pytest.approx(std.item(), rel=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_the_seed_decides_the_noise_too(mode):
    report = check_vector_env(PredictionAction(make(mode=mode)))
    assert report.weaknesses == {}
    assert "lanes do not depend on each other" in report.holds
    assert "an episode after autoreset is as one after a reset" in report.holds


def test_noise_differs_between_lanes_episodes_and_seeds():
    env = PredictionAction(make())
    start = {"latents": torch.ones(2, 1, 1)}
    seen = []
    for seed in (0, None, 100):
        env.reset(seed=seed, options=start)
        observation, *_ = env.step(torch.zeros(3, 2, 1, 1))
        seen += observation["latents"].flatten(1).tolist()
    assert len({tuple(row) for row in np.round(seen, 6)}) == 9


@pytest.mark.parametrize("env", [Walk(AutoresetMode.SAME_STEP), "TimePredictionMDP-v0"])
def test_other_environments_are_refused(env):
    env = gym.make_vec(env, model="mixture") if isinstance(env, str) else env
    with pytest.raises(TypeError, match="the action of the environment must be the next latents, as in DenoisingMDP"):
        PredictionAction(env)
