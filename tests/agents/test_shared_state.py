"""What others can see of a training while it runs: the policy as it is, and their own random numbers."""

import gymnasium as gym
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    DDPOSF,
    DPOK,
    GRPO,
    RLOO,
    RWR,
    DenoisingPolicy,
    DiffusionNFT,
    LoRA,
    PolicyGradient,
    Rollouts,
    Steps,
    TimePredictor,
    Window,
)
from agents.policies import BetaDistribution
from diffusion_gym.models import load_model
from diffusion_gym.samplers import DDIM


class Ask(BaseCallback):
    """Asks the policy the same at every step of a training."""

    def __init__(self, observation):
        super().__init__()
        self.observation = observation
        self.answers = []

    def _on_step(self):
        self.answers.append(self.model.predict(self.observation, deterministic=True)[0])
        return True


@pytest.mark.parametrize("algorithm", [DDPOSF, DDPOIS, RLOO, GRPO, DPOK, RWR, DiffusionNFT])
def test_callbacks_in_a_rollout_see_the_policy_as_it_is_outside(mixture, algorithm):
    env = gym.make_vec(
        "DenoisingMDP-v0", num_envs=8, num_steps=6, model=mixture, reward="brightness", autoreset_mode="DISABLED"
    )
    windows = {"steps": Steps(window=Window(2))} if issubclass(algorithm, PolicyGradient) else {}
    sizes = {"rollouts": Rollouts(group_size=4), "batch_size": 8}
    learner = algorithm(DenoisingPolicy(mixture, seed=0), env, learning_rate=0.0, seed=0, **sizes, **windows)
    observation, _ = env.reset(seed=3)
    outside, _ = learner.predict(observation, deterministic=True)
    asked = Ask(observation)
    learner.learn(3 * 48, asked, log_interval=0)
    assert len(asked.answers) == 18
    assert all(torch.equal(answer, outside) for answer in asked.answers)


def test_a_window_is_another_view_of_the_policy(mixture):
    policy = DenoisingPolicy(mixture, sampler=DDIM(eta=0.7), seed=0)
    times = mixture.schedule.timesteps(6).float()
    view = policy.windowed(float(times[1]), float(times[3]))
    assert view.denoiser is policy.denoiser
    assert view.generator is policy.generator
    info = {"timestep": times[:-1].numpy(), "next_timestep": times[1:].numpy()}
    assert view.scored(info).tolist() == [False, True, True, False, False, False]
    assert policy.scored(info).sum() >= 5
    observation = {
        "latents": torch.randn(6, *mixture.latent_shape, generator=torch.Generator().manual_seed(0)),
        "timestep": times[:-1, None],
        "next_timestep": times[1:, None],
        **mixture.encode_prompts(["anything"] * 6),
    }
    plain, windowed = policy.distribution(observation), view.distribution(observation)
    inside = torch.tensor([False, True, True, False, False, False])
    assert torch.equal(plain.mean[inside], windowed.mean[inside])
    assert torch.equal(plain.std[inside], windowed.std[inside])
    assert (windowed.std[~inside] == 0).all()


def test_policies_leave_the_global_random_state_alone(mixture):
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model=load_model("emoji"), max_steps=3, reward="brightness")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    policy = TimePredictor(env.single_observation_space, seed=0)
    DenoisingPolicy(env.unwrapped.model, adaptation=LoRA(), seed=0)
    distribution = BetaDistribution(torch.tensor([2.0, 3.0]), torch.tensor([4.0, 2.0]))
    distribution.sample(policy.generator)
    distribution.sample([torch.Generator().manual_seed(seed) for seed in (1, 2)])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = TimePredictor(env.single_observation_space, seed=0)
    assert all(torch.equal(*pair) for pair in zip(policy.parameters(), again.parameters(), strict=True))


def test_no_seed_is_set_of_the_whole_process(monkeypatch):
    """`torch.manual_seed` also seeds every CUDA device, which nothing here could see."""
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model=load_model("emoji"), max_steps=3, reward="brightness")
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("torch.manual_seed was called"))
    policy = TimePredictor(env.single_observation_space, seed=0)
    policy.act(env.reset(seed=0)[0])
    DenoisingPolicy(env.unwrapped.model, adaptation=LoRA(), seed=0)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (2.5, 6.0), (900.0, 300.0)])
def test_beta_draws_have_the_moments_of_a_beta(alpha, beta):
    count = 100_000
    distribution = BetaDistribution(torch.full((count,), alpha), torch.full((count,), beta))
    drawn = distribution.sample(torch.Generator().manual_seed(0)).double()
    mean, total = alpha / (alpha + beta), alpha + beta
    variance = mean * (1 - mean) / (total + 1)
    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * (variance / count) ** 0.5)
    assert float(drawn.var()) == pytest.approx(variance, rel=0.03)


def test_a_beta_draw_is_its_generators_whatever_the_batch():
    alpha, beta = torch.tensor([2.0, 3.0, 5.0]), torch.tensor([4.0, 2.0, 2.0])
    three = BetaDistribution(alpha, beta).sample([torch.Generator().manual_seed(seed) for seed in (1, 2, 3)])
    one = BetaDistribution(alpha[1:2], beta[1:2]).sample([torch.Generator().manual_seed(2)])
    assert torch.equal(three[1:2], one)
