"""DiffusionNFT: its loss, what is good, and the policy that draws."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import (
    DenoisingPolicy,
    DiffusionNFT,
    Full,
    Groups,
    LoRA,
    Noising,
    PerPrompt,
    PromptMeans,
    Replay,
    collect,
    evaluate,
)
from agents.nft import negative_aware_loss
from diffusion_gym.models import load_model
from diffusion_gym.samplers import DDIM
from tests.tiny import make_tiny_stable_diffusion


def make_env(model, num_envs=8, **arguments):
    arguments = {"num_steps": 3, "reward": "brightness", "prompts": ["anything", "north"], **arguments}
    return gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, model=model, **arguments)


def published_loss(v, old_v, x_t, x_0, t, r, beta):
    """NVlabs/DiffusionNFT, train_nft_sd3.py: on a flow, in velocities."""
    t = t[:, None]
    losses = []
    for implicit in (beta * v + (1 - beta) * old_v, (1 + beta) * old_v - beta * v):
        x_0_pred = x_t - t * implicit
        weight = (x_0_pred.double() - x_0.double()).abs().mean(1, keepdim=True).clip(min=0.00001)
        losses.append(((x_0_pred - x_0) ** 2 / weight.detach()).mean(1))
    return r * losses[0] / beta + (1.0 - r) * losses[1] / beta


def test_the_loss_is_the_published_one():
    generator = torch.Generator().manual_seed(0)
    v, old_v, x_0, noise = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(4))
    t, r = (torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(2))
    x_t = (1 - t)[:, None] * x_0 + t[:, None] * noise
    v.requires_grad_()
    for beta in (0.3, 1.0):
        expected = published_loss(v, old_v, x_t, x_0, t, r, beta)
        found = negative_aware_loss(x_t - t[:, None] * v, x_t - t[:, None] * old_v, x_0, r, beta=beta)
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(expected.sum(), v)
        (ours,) = torch.autograd.grad(found.sum(), v)
        torch.testing.assert_close(ours, gradient)


def test_good_samples_attract_and_bad_ones_repel():
    """At θ = old the gradient is that of (2r − 1)·ℓ: none for a sample that is as good as its like."""
    x0, clean = torch.tensor([[1.0, 2.0]] * 3, requires_grad=True), torch.zeros(3, 2)
    loss = negative_aware_loss(x0, x0.detach(), clean, torch.tensor([1.0, 0.5, 0.0]), beta=0.5)
    (gradient,) = torch.autograd.grad(loss.sum(), x0)
    assert (gradient[0] > 0).all()
    torch.testing.assert_close(gradient[1], torch.zeros(2))
    torch.testing.assert_close(gradient[2], -gradient[0])


def test_good_is_what_is_better_than_its_prompts_mean(mixture):
    """r = clip(A/(2·5) + ½), A less the prompt's mean of this rollout, by the standard deviation of all; no memory."""
    learner = DiffusionNFT(DenoisingPolicy(mixture, seed=0), make_env(mixture), advantage_clip=1.0, seed=0)
    replay = Replay.from_rollout(collect(learner.env, learner.policy, seeds=[0]))
    rewards, prompts = torch.tensor([1.0, 2, 3, 4, 50, 60, 50, 60]), np.repeat([0, 1], 4)
    replay = replace(replay, rewards=rewards, prompts=prompts)
    away = torch.tensor([-1.5, -0.5, 0.5, 1.5, -5, 5, -5, 5]) / (rewards.std(correction=0) + 1e-4)
    for _ in range(2):
        torch.testing.assert_close(learner.weights_of(replay), (away / 2 + 0.5).clamp(0, 1))
    assert torch.equal(learner.weights_of(replace(replay, rewards=21.3 + 1e-6 * away)), torch.full((8,), 0.5))
    with pytest.warns(UserWarning, match="nothing is learnt from it"):
        learner.weights_of(replace(replay, prompts=np.arange(8)))


def test_with_a_buffer_prompts_are_compared_with_their_past(mixture):
    learner = DiffusionNFT(DenoisingPolicy(mixture, seed=0), make_env(mixture), advantages=PerPrompt(8), seed=0)
    replay = Replay.from_rollout(collect(learner.env, learner.policy, seeds=[0]))
    ones = replace(replay, rewards=torch.ones(8), prompts=np.zeros(8, dtype=np.int64))
    assert (learner.weights_of(ones) == 0.5).all()
    assert (learner.weights_of(replace(ones, rewards=torch.arange(8.0)))[:4] < 0.5).all()
    assert list(learner.state()["advantages"]) == ["anything"]


@pytest.mark.parametrize(("kl_coefficient", "passes"), [(0.0, 2), (1e-4, 3)])
def test_the_reference_is_asked_only_for_a_pull_to_it(mixture, monkeypatch, kl_coefficient, passes):
    policy = DenoisingPolicy(mixture, seed=0)
    learner = DiffusionNFT(policy, make_env(mixture), kl_coefficient=kl_coefficient, seed=0)
    asked, predict = [], DenoisingPolicy.predict_noised
    monkeypatch.setattr(
        DenoisingPolicy, "predict_noised", lambda own, *inputs, **how: asked.append(own) or predict(own, *inputs, **how)
    )
    learner.learn(1, log_interval=0)
    assert len(asked) == passes


def test_an_untrained_policy_is_where_its_reference_is_in_bf16_too(tmp_path):
    """The reference computes as the policy does, its attention too, which is another one in bf16 on a CPU."""
    model = load_model(make_tiny_stable_diffusion(tmp_path / "model"))
    env = make_env(model, 4, prompts=["a cat"])
    policy = DenoisingPolicy(model, precision="bf16", sampler=DDIM(0.0), seed=0)
    learner = DiffusionNFT(policy, env, kl_coefficient=0.1, seed=0)
    assert float(learner.train(collect(env, policy, seeds=[0]))["kl"]) == 0


def test_the_policy_that_draws_follows_the_one_that_learns(mixture):
    env = make_env(mixture)
    policy = DenoisingPolicy(mixture, sampler=DDIM(eta=0.0), seed=0)
    learner = DiffusionNFT(policy, env, learning_rate=0.01, seed=0)
    assert learner.behaviour.model is mixture
    before = learner.behaviour.denoiser.last.bias.clone()
    learner.learn(24)
    first = policy.denoiser.last.bias.detach().clone()
    assert not torch.equal(first, before)
    torch.testing.assert_close(learner.behaviour.denoiser.last.bias, first)
    learner.learn(24, reset_num_timesteps=False)
    second = policy.denoiser.last.bias.detach()
    torch.testing.assert_close(learner.behaviour.denoiser.last.bias, first.lerp(second, 0.999))


def test_it_moves_the_mixture_toward_the_reward(mixture):
    """Deterministic sampling, which no policy gradient could learn from."""
    env = make_env(
        mixture, 512, num_steps=10, reward=lambda images, *_: mixture.positions(images)[:, 0], prompts=["anything"]
    )
    policy = DenoisingPolicy(mixture, sampler=DDIM(eta=0.0), seed=0)
    held_out = {"seeds": range(512), "prompts": ["anything"] * 512}
    before = evaluate(env, policy, **held_out)
    learner = DiffusionNFT(policy, env, learning_rate=3e-3, n_epochs=8, advantage_clip=1.0, seed=0)
    learner.learn(15 * 512 * 10, log_interval=0)
    gain, error = evaluate(env, policy, **held_out).gain_over(before)
    assert gain > 10 * error
    assert gain > 0.8


@pytest.mark.parametrize("advantages", [PromptMeans(), PerPrompt(16, 2)])
@pytest.mark.parametrize("adaptation", [Full(), LoRA()])
def test_an_interrupted_run_goes_on_bit_for_bit(mixture, tmp_path, adaptation, advantages):
    def make():
        policy = DenoisingPolicy(mixture, adaptation=adaptation, seed=0)
        parts = {"noising": Noising(draws=2, time_range=(0.5, 1.0), common=True), "advantages": advantages}
        return DiffusionNFT(policy, make_env(mixture), learning_rate=1e-2, batch_size=4, seed=3, **parts)

    whole = make()
    whole.learn(4 * 24, log_interval=0)
    half = make()
    half.learn(2 * 24, log_interval=0)
    half.save(tmp_path / "run")
    again = DiffusionNFT.load(tmp_path / "run", make_env(mixture))
    again.learn(2 * 24, log_interval=0, reset_num_timesteps=False)
    for ours, theirs in ((whole.policy, again.policy), (whole.behaviour, again.behaviour)):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    "arguments", [{"beta": 0.0}, {"advantage_clip": 0.0}, {"kl_coefficient": -1.0}, {"max_decay": 1.0}]
)
def test_wrong_arguments_are_named(mixture, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        DiffusionNFT(DenoisingPolicy(mixture), make_env(mixture), **arguments)


def test_groups_side_by_side_are_not_its_advantages(mixture):
    """A folder has none."""
    for wrong in (Groups(), "means"):
        with pytest.raises(TypeError, match=r"advantages must compare samples by their prompts, .* got "):
            DiffusionNFT(DenoisingPolicy(mixture), make_env(mixture), advantages=wrong)


def test_defaults_are_the_published_ones(mixture):
    learner = DiffusionNFT(DenoisingPolicy(mixture), make_env(mixture))
    assert (learner.advantages, learner.noising, learner.sizes.group) == (PromptMeans(), Noising(), 4)
    assert (learner.learning_rate, learner.beta, learner.advantage_clip) == (3e-4, 1.0, 5.0)
    assert (learner.kl_coefficient, learner.max_decay) == (1e-4, 0.5)
