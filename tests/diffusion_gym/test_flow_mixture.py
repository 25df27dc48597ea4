"""Samplers on a rectified flow of which everything is known: what they draw, and the densities of their steps."""

from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import GRPO, RLOO, DenoisingPolicy, Rollouts, evaluate
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import write_mixture
from diffusion_gym.samplers import CPS, DDIM, Consistency, FlowSDE
from diffusion_gym.transitions import transition

SAMPLES = 20_000
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Two components of different weights and widths on a line."""
    folder = tmp_path_factory.mktemp("line")
    return load_model(
        write_mixture(
            folder,
            [[-1.0], [2.0]],
            stds=[0.3, 0.7],
            weights=[1.0, 3.0],
            names=["left", "right"],
            scheduler=FLOW,
            width=16,
        )
    )


@torch.no_grad()
def drawn(model, sampler, num_steps, seed=0):
    """x_0 by a sampler with the exact network, sorted."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, 1, 1, 1, generator=generator)
    conditioning = model.encode_prompts(["anything"] * SAMPLES)
    for t, s in pairwise(model.schedule.timesteps(num_steps).float()[:, None].expand(-1, SAMPLES)):
        prediction = model.denoise(x, t, conditioning, guidance_scale=1.0)
        x = transition(prediction.x0, prediction.epsilon, sampler.scales(model.schedule, t, s)).sample(generator)
    return x.flatten().sort().values


def from_the_mixture(model, seed):
    conditioning = model.encode_prompts(["anything"] * SAMPLES)
    return model.draw(conditioning, torch.Generator().manual_seed(seed)).flatten().sort().values


def distance(x, y):
    """The Wasserstein-1 distance of two sets of as many samples on a line, sorted."""
    return float((x - y).abs().mean())


@pytest.fixture(scope="module")
def floor(line):
    """The largest distance among 20 pairs of sets of the mixture's own samples: what sampling alone makes of it."""
    sets = [from_the_mixture(line, seed) for seed in range(100, 121)]
    return max(distance(*pair) for pair in pairwise(sets))


@pytest.mark.parametrize(
    "sampler", [DDIM(0.0), DDIM(0.5), DDIM(1.0), FlowSDE(0.3), FlowSDE(0.7), FlowSDE(1.0)], ids=repr
)
def test_the_odes_marginals_are_kept(line, floor, sampler):
    x = drawn(line, sampler, 200)
    assert distance(x, from_the_mixture(line, 1)) < floor
    assert distance(x, drawn(line, DDIM(0.0), 200, seed=2)) < floor


@pytest.mark.parametrize("sampler", [CPS(0.7), CPS(1.0), Consistency()], ids=repr)
def test_cps_and_consistency_draw_another_and_narrower_law(line, floor, sampler):
    x, exact = drawn(line, sampler, 200), from_the_mixture(line, 1)
    assert distance(x, exact) > 3 * floor
    left, expected = x[x < 0], exact[exact < 0]
    assert float(left.quantile(0.9) - left.quantile(0.1)) < 0.9 * float(expected.quantile(0.9) - expected.quantile(0.1))


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
def test_the_velocity_is_that_of_the_posterior_mean(line, t):
    """Against E[x_0|x_t] = ∫ x_0 p(x_0) N(x_t; (1−t) x_0, t²) dx_0 / ∫ … on a grid, at the noisy end too."""
    grid = np.linspace(-6, 8, 40_001)
    prior = 0.25 * np.exp(-((grid + 1) ** 2) / 0.18) / 0.3 + 0.75 * np.exp(-((grid - 2) ** 2) / 0.98) / 0.7
    x = torch.tensor([-1.5, 0.0, 0.4, 2.5])
    expected = []
    for value in x.tolist():
        weight = prior * np.exp(-((value - (1 - t) * grid) ** 2) / (2 * t**2))
        expected.append((weight * grid).sum() / weight.sum())
    conditioning = line.encode_prompts(["anything"] * 4)
    found = line.denoise(x[:, None, None, None], torch.full((4,), t), conditioning, guidance_scale=1.0)
    np.testing.assert_allclose(found.x0.flatten().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_score_is_the_gradient_of_the_density(line):
    x = torch.linspace(-2, 3, 8, dtype=torch.float64)[:, None, None, None].requires_grad_()
    conditioning = line.encode_prompts(["anything"] * 8)
    for t in (0.1, 0.6, 1.0):
        times = torch.full((8,), t, dtype=torch.float64)
        (score,) = torch.autograd.grad(line.log_prob(x, times, conditioning).sum(), x)
        epsilon = line.denoise(x.detach(), times, conditioning, guidance_scale=1.0).epsilon
        torch.testing.assert_close(score, -epsilon / t)


def make_env(model, num_steps, num_envs):
    def position(images, prompts, metadata):
        return model.positions(images)[:, 0]

    return gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=num_envs,
        model=model,
        reward=position,
        num_steps=num_steps,
        prompts=["right"],
    )


@pytest.mark.parametrize("sampler", [FlowSDE(0.7), CPS(0.7), DDIM(0.5)], ids=repr)
def test_log_probs_are_those_of_the_normal_distribution(line, sampler):
    env = make_env(line, 5, 4)
    policy = DenoisingPolicy(line, sampler=sampler, seed=0)
    observation, _ = env.reset(seed=0)
    for step in range(5):
        distribution = policy.distribution(observation)
        action = policy.act(observation)
        std = distribution.std[:, None, None, None]
        if step < 4 or isinstance(sampler, FlowSDE):  # whose step to the clean end has a density too
            expected = torch.distributions.Normal(distribution.mean, std).log_prob(action).flatten(1).sum(1)
            torch.testing.assert_close(policy.log_prob(observation, action), expected)
        else:
            assert not std.any()
        observation = env.step(action)[0]


@pytest.mark.parametrize("algorithm", [RLOO, GRPO])
def test_policies_learn_with_the_noise_of_flow_grpo(line, algorithm):
    """The coordinate is the reward: samples move to the right."""
    env = make_env(line, 8, 64)
    policy = DenoisingPolicy(line, sampler=FlowSDE(0.7), seed=0)
    before = evaluate(env, policy, seeds=range(256))
    learner = algorithm(
        policy,
        env,
        learning_rate=3e-3,
        batch_size=64,
        rollouts=Rollouts(samples=64, group_size=16),
        log_prob_reduction="sum",
        clip_range=0.2,
        seed=0,
    )
    learner.learn(30 * 64 * 8, log_interval=0)
    gain, error = evaluate(env, policy, seeds=range(256)).gain_over(before)
    assert gain > 5 * error


def test_a_flow_and_a_network_of_noise_do_not_fit(line, tmp_path):
    folder = write_mixture(tmp_path / "noise", [[0.0], [1.0]], stds=[1.0, 1.0], names=["left", "right"])
    (folder / "scheduler" / "scheduler_config.json").write_text(
        (line.path / "scheduler" / "scheduler_config.json").read_text()
    )
    with pytest.raises(ValueError, match="a mixture predicts epsilon, got 'flow'"):
        load_model(folder)
    dynamic = {**FLOW, "use_dynamic_shifting": True}
    folder = write_mixture(tmp_path / "dynamic", [[0.0]], stds=[1.0], names=["only"], scheduler=dynamic)
    with pytest.raises(ValueError, match="use_dynamic_shifting is for images, which this model has none of"):
        load_model(folder)


def test_times_can_be_predicted_on_a_flow(line):
    env = gym.make("TimePredictionMDP-v0", model=line, reward="reference_distance")
    env.reset(seed=0)
    assert np.isfinite(env.step(np.array([0.5], dtype=np.float32))[1])
