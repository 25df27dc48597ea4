import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion_gym.samplers import DDIM, Scales
from diffusion_gym.schedules import FlowSchedule
from diffusion_gym.transitions import GaussianTransition, draw_noise, transition

SHAPE = (3, 4, 8, 8)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_transition_is_the_scaled_predictions_and_noise():
    x0, epsilon = seeded(SHAPE), seeded(SHAPE, seed=1)
    of_x0, of_epsilon, std = torch.rand(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = transition(x0, epsilon, Scales(of_x0, of_epsilon, std))
    for lane in range(3):
        assert torch.equal(step.mean[lane], of_x0[lane] * x0[lane] + of_epsilon[lane] * epsilon[lane])
    assert step.std is std
    assert not step.deterministic
    assert transition(x0, epsilon, Scales(of_x0, of_epsilon, 0 * std, deterministic=True)).deterministic


def test_log_prob_and_kl_are_those_of_torch_normal():
    mean, other_mean, value = seeded(SHAPE), seeded(SHAPE, seed=1), seeded(SHAPE, seed=2)
    std, other_std = torch.tensor([0.02, 0.4, 1.0]).double(), torch.tensor([0.03, 0.4, 0.5]).double()
    transition, other = GaussianTransition(mean, std), GaussianTransition(other_mean, other_std)
    normal = Normal(mean, std[:, None, None, None])
    other_normal = Normal(other_mean, other_std[:, None, None, None])
    expected = normal.log_prob(value).flatten(1)
    torch.testing.assert_close(transition.log_prob(value), expected.sum(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(transition.log_prob(value, reduction="mean"), expected.mean(1), rtol=1e-13, atol=0)
    divergence = kl_divergence(normal, other_normal).flatten(1).sum(1)
    torch.testing.assert_close(transition.kl(other), divergence, rtol=1e-13, atol=0)
    assert torch.equal(transition.kl(transition), torch.zeros(3, dtype=torch.float64))


def test_entropy_is_that_of_torch_normal_and_zero_for_a_point():
    std = torch.tensor([0.02, 0.4, 0.0]).double()
    expected = Normal(torch.zeros(SHAPE).double(), std.clamp(min=1e-9)[:, None, None, None]).entropy().flatten(1).sum(1)
    entropy = GaussianTransition(seeded(SHAPE), std).entropy()
    torch.testing.assert_close(entropy[:2], expected[:2], rtol=1e-13, atol=0)
    assert entropy[2] == 0


def test_entropy_is_minus_the_mean_log_prob_of_draws():
    step = GaussianTransition(seeded(1, 5).expand(50_000, 5), torch.full((50_000,), 0.3).double())
    log_probs = step.log_prob(step.sample(torch.Generator().manual_seed(0)))
    error = 4 * float(log_probs.std()) / math.sqrt(len(log_probs))
    assert -float(log_probs.mean()) == pytest.approx(float(step.entropy()[0]), abs=error)


def test_sample_has_the_mean_and_std_of_the_transition():
    mean, std = seeded(1, 4, 1, 1).expand(2, 4, 200, 200), torch.tensor([0.1, 2.0]).double()
    sample = GaussianTransition(mean, std).sample(torch.Generator().manual_seed(0))
    error = (sample - mean).flatten(1)
    assert (error.mean(1).abs() < 4 * std / 400).all()
    torch.testing.assert_close(error.std(1), std, rtol=0.01, atol=0)


def test_deterministic_transition_samples_its_mean_and_has_no_density():
    x0, epsilon, t = seeded(SHAPE), seeded(SHAPE, seed=1), torch.full((3,), 0.5)
    step = transition(x0, epsilon, DDIM(0.0).scales(FlowSchedule(), t, t / 2))
    assert torch.equal(step.sample(), step.mode)
    with pytest.raises(ValueError, match="eta > 0"):
        step.log_prob(step.mean)
    with pytest.raises(ValueError, match="eta > 0"):
        step.kl(step)


def test_lanes_that_reach_the_clean_end_score_zero_and_give_no_gradient():
    mean = seeded(2, 4).requires_grad_()
    transition = GaussianTransition(mean, torch.tensor([0.0, 0.5]).double())
    log_prob = transition.log_prob(mean.detach() + 0.1)
    assert log_prob[0] == 0
    log_prob.sum().backward()
    assert (mean.grad[0] == 0).all()
    assert (mean.grad[1] != 0).all()
    assert torch.isfinite(mean.grad).all()


def test_lane_generators_make_the_noise_of_a_lane_independent_of_the_batch():
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    whole = draw_noise(torch.empty(4, 2, 3), generators())
    part = draw_noise(torch.empty(2, 2, 3), generators()[1:3])
    assert torch.equal(whole[1:3], part)
    with pytest.raises(ValueError, match="one per sample: got 4 for a batch of 3"):
        draw_noise(torch.empty(3, 2), generators())


def test_reductions_that_there_are_not_are_refused():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match='"sum" or "mean"'):
        GaussianTransition(one, one[0]).log_prob(one, reduction="max")


def test_steps_that_are_certain_on_both_sides_diverge_by_nothing_and_give_no_gradient():
    mean = seeded(2, 4).requires_grad_()
    one = GaussianTransition(mean, torch.tensor([0.0, 0.5]).double())
    other = GaussianTransition(seeded(2, 4, seed=1), torch.tensor([0.0, 0.5]).double())
    divergence = one.kl(other)
    assert divergence[0] == 0
    assert divergence[1] > 0
    divergence.sum().backward()
    assert (mean.grad[0] == 0).all()
    assert torch.isfinite(mean.grad).all()
    assert (mean.grad[1] != 0).all()
