"""Potential-based shaping pays in every step, and leaves returns as they are but for the start's potential."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import diffusion_gym  # noqa: F401
from diffusion_gym.models import load_model
from diffusion_gym.sampling import sample_latents
from diffusion_gym.testing import check_vector_env
from diffusion_gym.wrappers import NumpyToTorch, PotentialShaping, PredictedReward
from tests.diffusion_gym.testing.walk import Walk

MODES = list(AutoresetMode)
NUM_STEPS = 4


def height(observation):
    return observation["latents"][:, 1, 0, 0] ** 2


def make(mode=AutoresetMode.SAME_STEP, num_envs=3, **options):
    options = {"model": "mixture", "num_steps": NUM_STEPS, "reward": "brightness", **options}
    return gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, autoreset_mode=mode, **options)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("mode", MODES)
def test_a_discounted_return_changes_by_the_potential_of_the_start(mode, gamma):
    """Σ γ^k·(γΦ(s_{k+1}) − Φ(s_k)) = −Φ(s_0), in each of two episodes."""
    env = PotentialShaping(make(mode), height, gamma=gamma)
    observation, info = env.reset(seed=0)
    start, step, episodes = height(observation), 0, 0
    change = torch.zeros(3)
    while episodes < 2:
        before_reset = mode is AutoresetMode.NEXT_STEP and info["ended"].all()
        observation, reward, *_, info = env.step(torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(step)))
        if before_reset:
            assert (reward == 0).all()
            start, change, step = height(observation), torch.zeros(3), 0
            continue
        change += gamma**step * info["shaping"]
        step += 1
        if info["ended"].all():
            torch.testing.assert_close(change, -start)
            episodes += 1
            if mode is AutoresetMode.DISABLED:
                observation, info = env.reset(options={"reset_mask": info["ended"]})
            start, change, step = height(observation), torch.zeros(3), 0


@pytest.mark.parametrize("mode", MODES)
def test_lanes_of_other_lengths_telescope_too(mode):
    def potential(observation):
        return observation["position"].sum(1)

    env = PotentialShaping(NumpyToTorch(Walk(mode)), potential)
    observation, info = env.reset(seed=1)
    starts, changes, over, episodes = potential(observation), torch.zeros(3), np.zeros(3, bool), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        observation, *_, info = env.step(torch.rand(3, 2, generator=generator))
        changes += info["shaping"]
        ended = info["ended"]
        for lane in range(3):
            if over[lane]:
                assert info["shaping"][lane] == 0
            if ended[lane]:
                torch.testing.assert_close(changes[lane], -starts[lane], rtol=1e-4, atol=1e-5)
                episodes += 1
        if mode is AutoresetMode.DISABLED and ended.any():
            observation, _ = env.reset(options={"reset_mask": ended})
        fresh = torch.from_numpy(over if mode is AutoresetMode.NEXT_STEP else ended)
        starts, changes = torch.where(fresh, potential(observation), starts), torch.where(fresh, 0.0, changes)
        over = ended & (mode is AutoresetMode.NEXT_STEP)
    assert episodes >= 10


@pytest.mark.parametrize("mode", MODES)
def test_the_environment_behind_it_passes_the_check(mode):
    env = make(mode)
    assert check_vector_env(PotentialShaping(env, PredictedReward(env))).weaknesses == {}


def test_the_predicted_reward_is_that_of_the_predicted_image(mixture):
    env = make()
    observation, _ = env.reset(seed=0)
    potential = PredictedReward(env, weight=2.0)
    texts = [env.unwrapped.prompts[int(index)] for index in observation["prompt_id"][:, 0]]
    conditioning = mixture.encode_prompts(texts)
    t = observation["timestep"][:, 0]
    prediction = mixture.denoise(observation["latents"], t, conditioning, guidance_scale=1.0)
    expected = 2 * mixture.decode(prediction.x0).mean((1, 2, 3))
    torch.testing.assert_close(potential(observation), expected)


def test_the_shaped_reward_foretells_the_return():
    """On the way of the frozen model the potential comes to the image's own reward: the last step is hardly paid."""
    model = load_model("mixture")
    env = make(num_envs=32, num_steps=20)
    env = PotentialShaping(env, PredictedReward(env))
    observation, _ = env.reset(seed=0)
    times = model.schedule.timesteps(20)
    texts = [env.unwrapped.prompts[int(index)] for index in observation["prompt_id"][:, 0]]
    conditioning = model.encode_prompts(texts)
    latents, shaped = observation["latents"], []
    for step in range(20):
        latents = sample_latents(model, latents, conditioning, times[step : step + 2])
        _, reward, *_ = env.step(latents)
        shaped.append(reward)
    shaped = torch.stack(shaped)
    assert shaped[-1].abs().mean() < 0.1 * shaped[:-1].abs().sum(0).mean()


def test_another_denoiser_may_foretell(mixture):
    class Zero(torch.nn.Module):
        def forward(self, latents, alpha, sigma, present):
            hidden = latents.new_zeros(len(latents), 64)
            return torch.zeros_like(latents), (hidden, hidden), latents.new_zeros(len(latents), 16)

    env = make()
    observation, _ = env.reset(seed=0)
    potential = PredictedReward(env, denoiser=Zero())
    alpha = mixture.schedule.alpha(observation["timestep"][:, 0])
    expected = mixture.decode(observation["latents"] / alpha[:, None, None, None]).mean((1, 2, 3))
    torch.testing.assert_close(potential(observation), expected)


def test_it_says_what_is_wrong():
    env = make()
    with pytest.raises(ValueError, match=r"gamma must be a finite number in \[0, 1\], got 2"):
        PotentialShaping(env, height, gamma=2)
    with pytest.raises(TypeError, match="the predicted reward needs an environment of this package, got Walk"):
        PredictedReward(Walk(AutoresetMode.SAME_STEP))
    shaped = PotentialShaping(env, lambda observation: observation["latents"])
    with pytest.raises(ValueError, match=r"one number per lane, a tensor \[3\], got \[3, 2, 1, 1\]"):
        shaped.reset(seed=0)
    env = make(observe_embeds=True)
    shaped = PotentialShaping(env, PredictedReward(env))
    with pytest.raises(ValueError, match="knows prompts by their index: put every text into prompts="):
        shaped.reset(seed=0, options={"prompt": "north and south"})
