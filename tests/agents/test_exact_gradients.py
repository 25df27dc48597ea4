"""Each estimator's mean gradient against the exact one, on a mixture.

Three DDPM steps of a mixture in the plane, a reward that is not linear in x_0, and a policy away from the exact
denoiser. The exact ∇J of J(θ) = E[r(x_0)] comes from the other side: by backpropagation through the sampling chain, the
noise held fixed (the reward is smooth and known here), averaged over 2^18 chains. An estimator's gradient is averaged
over independent rollouts. Every one of its 10 components has to lie within 4.5 standard errors of the exact one times
the estimator's factor (a false alarm in 15,000 runs, were the draws not seeded), and the error has to be small beside
the gradient, or the test would show nothing. The same chain gives the gradient of a KL-penalised objective.
"""

import itertools
from dataclasses import dataclass
from typing import final

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DDPOSF, GRPO, KL, RLOO, AdamW, DenoisingPolicy, Groups, Rollouts
from agents.advantages import Advantages
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import write_mixture
from diffusion_gym.samplers import DDIM
from diffusion_gym.transitions import transition
from tests.gradients import applied_gradients

NUM_STEPS, DIMENSIONS, LANES, ROLLOUTS = 3, 2, 1024, 60
ALPHAS_CUMPROD = np.array([0.9, 0.6, 0.25, 0.02])


def reward_of(x):
    """Large beside what it varies by: without a baseline the variance is large too."""
    return 1.0 + torch.sin(2 * x[:, 0]) + 0.5 * x[:, 1]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Its last level is noisy enough for every step to have a density that is not too narrow."""
    betas = 1 - ALPHAS_CUMPROD / np.concatenate([[1.0], ALPHAS_CUMPROD[:-1]])
    process = {
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    means = [[-1.0, 0.0], [1.0, 0.5]]
    folder = tmp_path_factory.mktemp("plane")
    write_mixture(folder, means, stds=[0.4, 0.6], names=["left", "right"], scheduler=process, width=4)
    return load_model(folder)


@pytest.fixture
def policy(mixture):
    """Trains its last layer alone, which is away from zero."""
    policy = DenoisingPolicy(mixture, seed=0)
    policy.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.denoiser.last.parameters():
        parameter.requires_grad_().data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture
def env(mixture):
    def reward(images, prompts, metadata):
        return reward_of(mixture.positions(images))

    arguments = {"model": mixture, "reward": reward, "prompts": ["anything"], "autoreset_mode": "DISABLED"}
    return gym.make_vec("DenoisingMDP-v0", num_envs=LANES, num_steps=NUM_STEPS, **arguments)


def take_gradient(policy):
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
    policy.zero_grad()
    return gradient


def mean_and_error(gradients):
    gradients = torch.stack(gradients)
    return gradients.mean(0), gradients.std(0) / len(gradients) ** 0.5


def exact_gradient(mixture, policy, kl_coefficient=0.0):
    """Return ∇(E[R] − β·E[Σ_t KL_t]) through the chain, the KL to the exact denoiser's; and its standard error."""
    generator = torch.Generator().manual_seed(1)
    conditioning = {key: value.expand(4096, -1, -1) for key, value in mixture.encode_prompts(["anything"]).items()}
    grid = mixture.schedule.timesteps(NUM_STEPS).float()
    gradients = []
    for _ in range(64):
        x = torch.randn(4096, *mixture.latent_shape, generator=generator)
        kl = torch.zeros(len(x))
        for now, following in itertools.pairwise(grid):
            t, s = now.expand(len(x)), following.expand(len(x))
            step, reference = (
                transition(prediction.x0, prediction.epsilon, DDIM(1.0).scales(mixture.schedule, t, s))
                for prediction in (
                    mixture.denoise(x, t, conditioning, guidance_scale=1.0, denoiser=denoiser)
                    for denoiser in (policy.denoiser, mixture.denoiser)
                )
            )
            kl = kl + (step.mean - reference.mean).flatten(1).square().sum(1) / (2 * step.std**2)
            x = step.mean + step.std[:, None, None, None] * torch.randn(x.shape, generator=generator)
        (reward_of(x.flatten(1)) - kl_coefficient * kl).mean().backward()
        gradients.append(take_gradient(policy))
    return mean_and_error(gradients)


def estimated_gradient(algorithm):
    """Return the mean of −∇loss over rollouts of the untouched policy, and its standard error."""
    applied = applied_gradients(algorithm)
    algorithm.learn(ROLLOUTS * LANES * NUM_STEPS, log_interval=0)
    assert len(applied) == ROLLOUTS
    return mean_and_error([-torch.cat([gradient.flatten() for gradient in gradients]) for gradients in applied])


def largest_deviation(estimated, exact, factor):
    """Return the largest difference in standard errors, once these are seen to be small."""
    (mean, error), (true_mean, true_error) = estimated, exact
    total = torch.sqrt(error**2 + (factor * true_error) ** 2)
    assert float(total.norm()) < 0.1 * factor * float(true_mean.norm())
    return float(((mean - factor * true_mean).abs() / total).max())


@final
@dataclass(frozen=True)
class Raw(Advantages):
    """The rewards themselves."""

    def estimate(self, rewards, memory):
        return rewards.values


def groups(size=4, *, same_noise=False):
    return Rollouts(group_size=size, same_noise=same_noise)


UNTOUCHED = {"learning_rate": 0.0, "optimizer": AdamW(max_grad_norm=None), "seed": 0}
TRAJECTORY = {**UNTOUCHED, "ratio": "trajectory", "rollouts": groups()}
DDPO = {"rollouts": Rollouts(), "batch_size": None, "advantages": Raw()}
WHOLE, PER_STEP, PER_STEP_AND_DIMENSION = 1.0, 1 / NUM_STEPS, 1 / (NUM_STEPS * DIMENSIONS)


@pytest.mark.parametrize(
    ("estimator", "arguments", "factor"),
    [
        (DDPOSF, {**DDPO, "log_prob_reduction": "sum"}, PER_STEP),
        (DDPOSF, {**DDPO, "log_prob_reduction": "mean"}, PER_STEP_AND_DIMENSION),
        (DDPOIS, {**DDPO, "log_prob_reduction": "sum"}, PER_STEP),
        (RLOO, TRAJECTORY, WHOLE),
        (RLOO, {**TRAJECTORY, "rollouts": groups(same_noise=True)}, WHOLE),
        (RLOO, {**TRAJECTORY, "advantages": Groups("group_mean")}, 3 / 4),
        (RLOO, {"rollouts": groups(2), "ratio": "step", "log_prob_reduction": "sum"}, PER_STEP),
        (GRPO, {"rollouts": groups(1024), "advantages": Groups()}, PER_STEP_AND_DIMENSION),
    ],
)
def test_the_mean_gradient_is_the_exact_one_times_its_factor(mixture, policy, env, estimator, arguments, factor):
    algorithm = estimator(policy, env, **{**UNTOUCHED, **arguments})
    exact = exact_gradient(mixture, policy)
    assert largest_deviation(estimated_gradient(algorithm), exact, factor) < 4.5


@pytest.mark.parametrize("broken", ["a baseline that knows the action", "the last step is not scored"])
def test_broken_estimators_are_found_out(mixture, policy, env, broken, monkeypatch):
    """Each is right but for one thing, and would train."""
    knows = broken == "a baseline that knows the action"
    algorithm = RLOO(policy, env, **TRAJECTORY, advantages=Groups("group_mean" if knows else "leave_one_out"))
    if not knows:
        monkeypatch.setattr(policy, "scored", lambda info: np.asarray(info["next_timestep"]) > 0)
    exact = exact_gradient(mixture, policy)
    assert largest_deviation(estimated_gradient(algorithm), exact, WHOLE) > 6


def test_only_the_exact_kl_place_gives_the_gradient_of_the_penalised_objective(mixture, policy, env):
    """For a policy that is farther from the reference in some states than in others: where an action leads counts."""
    for layer in (policy.denoiser.first, policy.denoiser.second):
        for parameter in layer.parameters():
            parameter.data *= 3
    policy.denoiser.last.bias.data.zero_()
    exact = exact_gradient(mixture, policy, kl_coefficient=0.5)

    def deviation(place):
        algorithm = RLOO(policy, env, **TRAJECTORY, kl=KL(0.5, place=place))
        return largest_deviation(estimated_gradient(algorithm), exact, WHOLE)

    assert deviation("exact") < 4.5
    assert deviation("loss") > 15
    assert deviation("reward") > 15
