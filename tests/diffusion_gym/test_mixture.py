import json
import math
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DenoisingPolicy, Full, LoRA, Rollouts, TimePredictor, collect, evaluate
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import write_mixture


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Two components of different weights and widths on a line."""
    folder = tmp_path_factory.mktemp("line")
    return load_model(
        write_mixture(folder, [[-1.0], [2.0]], stds=[0.3, 0.7], weights=[1.0, 3.0], names=["left", "right"])
    )


def of(model, *prompts):
    return model.encode_prompts(prompts)


@pytest.mark.parametrize("t", [20.0, 300.0, 700.0])
def test_the_denoiser_is_the_posterior_mean(line, t):
    """Against E[x_0|x_t] = ∫ x_0 p(x_0) N(x_t; α x_0, σ²) dx_0 / ∫ … on a grid."""
    grid = np.linspace(-6, 8, 40_001)
    prior = 0.25 * np.exp(-((grid + 1) ** 2) / 0.18) / 0.3 + 0.75 * np.exp(-((grid - 2) ** 2) / 0.98) / 0.7
    alpha, sigma = (float(f(torch.tensor(t, dtype=torch.float64))) for f in (line.schedule.alpha, line.schedule.sigma))
    x = torch.tensor([-1.5, 0.0, 0.4, 2.5])
    expected = []
    for value in x.tolist():
        weight = prior * np.exp(-((value - alpha * grid) ** 2) / (2 * sigma**2))
        expected.append((weight * grid).sum() / weight.sum())
    found = line.denoise(x.reshape(4, 1, 1, 1), torch.full((4,), t), of(line, *["anything"] * 4), guidance_scale=1.0)
    np.testing.assert_allclose(found.x0.flatten().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_score_is_the_gradient_of_the_density(mixture):
    prompts = ["anything", "north", "east and west", "north and south-east"]
    x = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    for t in (1.0, 250.0, 999.0):
        times = torch.full((4,), t, dtype=torch.float64)
        density = mixture.log_prob(x, times, of(mixture, *prompts))
        (score,) = torch.autograd.grad(density.sum(), x)
        epsilon = mixture.denoise(x.detach(), times, of(mixture, *prompts), guidance_scale=1.0).epsilon
        torch.testing.assert_close(score, -epsilon / mixture.schedule.sigma(times)[:, None, None, None])


def test_the_density_integrates_to_one(line):
    grid = torch.linspace(-8, 9, 20_001, dtype=torch.float64)
    for t in (-1.0, 500.0):
        times = torch.full((len(grid),), t, dtype=torch.float64)
        density = line.log_prob(grid[:, None, None, None], times, of(line, *["anything"] * len(grid))).exp()
        assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-6)


def test_ancestral_sampling_draws_the_mixture(mixture):
    """250 steps against the mixture's own draws: shares of the components, radius, and the named ones alone."""
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2048, num_steps=250, model=mixture, reward="brightness")
    policy = DenoisingPolicy(mixture, seed=0)
    prompts = ["anything"] * 1024 + ["north and south"] * 1024
    drawn = evaluate(env, policy, seeds=list(range(2048)), prompts=prompts, max_images=2048)
    x = mixture.positions(drawn.images)
    exact = mixture.draw(of(mixture, *prompts), torch.Generator().manual_seed(0)).flatten(1)
    angles = torch.atan2(x[:1024, 1], x[:1024, 0]) / (math.pi / 4)
    shares = torch.bincount(angles.round().long() % 8, minlength=8) / 1024
    assert (shares - 1 / 8).abs().max() < 4 * math.sqrt(1 / 8 * 7 / 8 / 1024)
    radius, expected = x[:1024].norm(dim=1), exact[:1024].norm(dim=1)
    assert float(radius.mean()) == pytest.approx(float(expected.mean()), abs=0.04)
    assert float(radius.std()) == pytest.approx(float(expected.std()), rel=0.1)
    named = x[1024:]
    assert named[:, 0].abs().max() < 1.3
    assert named[:, 1].abs().min() > 0.7
    assert 0.4 < float((named[:, 1] > 0).float().mean()) < 0.6


def test_eight_components_stand_on_a_circle(mixture):
    assert mixture.default_prompts[:3] == ("anything", "east", "north-east")
    centres = mixture.denoiser.centres
    torch.testing.assert_close(centres.norm(dim=1), torch.full((8,), 2.0), rtol=1e-5, atol=1e-5)
    north = mixture.draw(of(mixture, *["north"] * 256), torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(north.mean(0), torch.tensor([0.0, 2.0]), rtol=0, atol=0.07)


def test_images_hold_the_coordinates(mixture, tmp_path):
    latents = torch.tensor([[-1.5, 2.0], [0.0, 0.3]])[:, :, None, None]
    images = mixture.decode(latents)
    assert images.shape == (2, 3, 1, 1)
    torch.testing.assert_close(mixture.positions(images), latents.flatten(1))
    torch.testing.assert_close(mixture.encode(images), latents)
    wide = load_model(write_mixture(tmp_path, [[0.0] * 7, [1.0] * 7], stds=[0.1, 0.2], names=["one", "two"]))
    latents = torch.randn(3, 7, 1, 1)
    assert wide.decode(latents).shape == (3, 3, 1, 3)
    torch.testing.assert_close(wide.positions(wide.decode(latents)), latents.flatten(1).clamp(-2.6, 2.6))


def test_prompts_name_components(mixture):
    embeds = of(mixture, "anything", "north and south", "east")["prompt_embeds"][:, 0]
    assert embeds.sum(-1).tolist() == [8, 2, 1]
    assert of(mixture, "east")["negative_prompt_embeds"].sum() == 8
    with pytest.raises(ValueError, match=r"unknown component 'nort'.* Did you mean 'north'\?"):
        of(mixture, "nort and south")
    env = gym.make("DenoisingMDP-v0", model="mixture", num_steps=2)
    assert env.unwrapped.prompts.texts == mixture.default_prompts


def test_it_can_be_pickled_saved_and_adapted(mixture, tmp_path):
    again = pickle.loads(pickle.dumps(mixture))
    assert torch.equal(again.denoiser.centres, mixture.denoiser.centres)
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=3, model=mixture, reward="brightness")
    for adaptation in (Full(), LoRA()):
        policy = DenoisingPolicy(mixture, adaptation=adaptation, seed=0)
        algorithm = DDPOIS(policy, env, rollouts=Rollouts(4), batch_size=4, learning_rate=0.1, seed=0)
        algorithm.learn(12)
        folder = tmp_path / type(adaptation).__name__
        algorithm.save(folder)
        loaded = DDPOIS.load(folder, env)
        observation, _ = env.reset(seed=0)
        mean = policy.distribution(observation).mean
        assert torch.equal(loaded.policy.distribution(observation).mean, mean)
        assert not torch.equal(DenoisingPolicy(mixture).distribution(observation).mean, mean)
    assert not mixture.denoiser.last.weight.any()


def test_times_can_be_predicted_on_it(mixture):
    env = gym.make_vec(
        "TimePredictionMDP-v0", num_envs=4, model=mixture, reward="reference_distance", autoreset_mode="DISABLED"
    )
    policy = TimePredictor(env.single_observation_space, initial_ratio=0.7, seed=0)
    rollout = collect(env, policy, seeds=[0])
    assert (rollout.returns < 0).all()
    assert (rollout.returns > -0.05).all()
    assert len(set(rollout.lengths.tolist())) > 1


def test_half_precision_arithmetic_stays_near(mixture):
    """Only the trained part is computed in half precision."""
    env = gym.make_vec("DenoisingMDP-v0", num_envs=8, num_steps=3, model=mixture, reward="brightness")
    observation, _ = env.reset(seed=0)
    exact, half = (DenoisingPolicy(mixture, precision=p).distribution(observation).mean for p in (None, "bf16"))
    torch.testing.assert_close(exact, half, rtol=1e-5, atol=1e-5)


def test_wrong_mixtures_are_refused(mixture, tmp_path):
    good = {"means": [[0.0, 1.0], [1.0, 0.0]], "stds": [0.1, 0.1], "names": ["one", "two"]}
    for wrong, message in (
        ({"means": [[0.0], [1.0, 2.0]]}, "K rows of one length"),
        ({"stds": [0.1]}, "K rows of one length"),
        ({"stds": [0.1, 0.0]}, "must be positive"),
        ({"weights": [1.0, -1.0]}, "must be positive"),
        ({"names": ["one", "one"]}, "must differ"),
        ({"names": ["one", "anything"]}, "must differ"),
        ({"names": ["one", "two and three"]}, "must differ"),
    ):
        with pytest.raises(ValueError, match=message):
            write_mixture(tmp_path / "wrong", **{**good, **wrong})
    with pytest.raises(ValueError, match="1 pixel high"):
        load_model("mixture", image_size=64)
    assert json.loads((mixture.path / "model_index.json").read_text())["_class_name"] == "MixturePipeline"
