import pytest
import torch

from agents.losses import (
    approximate_kl,
    bounded_ratio,
    clipped_surrogate,
    clipped_surrogate_coefficients,
    clipped_surrogate_loss,
    score_function_loss,
    score_function_surrogate,
)


def naive_clipped(log_prob, old, advantages, clip):
    """PPO's loss, one number at a time, in float64."""
    losses = []
    for lp, lo, a in zip(log_prob.tolist(), old.tolist(), advantages.tolist(), strict=True):
        ratio = torch.tensor(lp - lo, dtype=torch.float64).exp().item()
        clipped = min(max(ratio, 1 - clip), 1 + clip)
        losses.append(-min(ratio * a, clipped * a))
    return torch.tensor(losses, dtype=torch.float64)


def vectors(seed=0, size=200):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, size, generator=generator, dtype=torch.float64) * torch.tensor([[0.3], [0.3], [2.0]])


@pytest.mark.parametrize("clip_range", [1e-4, 0.2])
def test_clipped_surrogate_is_ppos_loss(clip_range):
    log_prob, old, advantages = vectors()
    loss = clipped_surrogate_loss(log_prob, old, advantages, clip_range=clip_range)
    torch.testing.assert_close(loss, naive_clipped(log_prob, old, advantages, clip_range), rtol=1e-12, atol=1e-12)


def test_both_losses_have_the_policy_gradient_where_nothing_has_changed_yet():
    log_prob, _, advantages = vectors()
    gradients = []
    for loss in (
        lambda lp: score_function_loss(lp, advantages),
        lambda lp: clipped_surrogate_loss(lp, log_prob, advantages, clip_range=1e-4),
    ):
        variable = log_prob.clone().requires_grad_()
        loss(variable).sum().backward()
        gradients.append(variable.grad)
    torch.testing.assert_close(gradients[0], -advantages)
    torch.testing.assert_close(gradients[1], -advantages)


@pytest.mark.parametrize("clip_range", [1e-3, 0.2, None])
def test_a_surrogates_coefficient_is_the_derivative_of_its_loss(clip_range):
    """By autograd, away from the edges of the clip and from advantages of 0, where there is none; None: no clip."""
    log_prob, old, advantages = vectors(size=2000)
    variable = log_prob.clone().requires_grad_()
    if clip_range is None:
        surrogate, loss = score_function_surrogate(log_prob, advantages), score_function_loss(variable, advantages)
    else:
        edges = torch.tensor([1 - clip_range, 1 + clip_range], dtype=torch.float64)
        assert ((log_prob - old).exp()[:, None] - edges).abs().min() > 1e-9
        assert advantages.abs().min() > 1e-9
        surrogate = clipped_surrogate(log_prob, old, advantages, clip_range=clip_range)
        loss = clipped_surrogate_loss(variable, old, advantages, clip_range=clip_range)
        assert 0.1 < (surrogate.coefficient == 0).double().mean() < 0.9
        outside = ((log_prob - old).exp() - 1).abs() > clip_range
        assert torch.equal(surrogate.metrics["clip_fraction"], outside.float())
    (derivative,) = torch.autograd.grad(loss.sum(), variable)
    assert torch.equal(surrogate.loss, loss.detach())
    torch.testing.assert_close(surrogate.coefficient, derivative, rtol=1e-12, atol=1e-12)


def test_clipping_stops_the_gradient_on_the_profitable_side_only():
    old = torch.zeros(4)
    log_prob = torch.tensor([0.5, -0.5, 0.5, -0.5]).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    clipped_surrogate_loss(log_prob, old, advantages, clip_range=0.2).sum().backward()
    assert (log_prob.grad == 0).tolist() == [True, True, False, False]


def test_approximate_kl_is_never_negative_and_right_in_the_mean():
    mean, generator = 0.3, torch.Generator().manual_seed(0)
    samples = torch.randn(200_000, generator=generator, dtype=torch.float64)
    old, new = -(samples**2) / 2, -((samples - mean) ** 2) / 2
    estimate = approximate_kl(new, old)
    assert (estimate >= 0).all()
    assert estimate.mean().item() == pytest.approx(mean**2 / 2, rel=0.02)


@pytest.mark.parametrize("log_ratio", [30.0, 100.0, 1e4, -30.0, -1e4])
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_ratios_that_overflow_are_bounded_and_have_no_gradient(log_ratio, advantage):
    log_prob, old = torch.tensor([log_ratio], requires_grad=True), torch.zeros(1)
    advantages = torch.tensor([advantage])
    loss = clipped_surrogate_loss(log_prob, old, advantages, clip_range=0.2)
    loss.sum().backward()
    coefficients = clipped_surrogate_coefficients(log_prob.detach(), old, advantages, clip_range=0.2)
    for value in (loss, log_prob.grad, coefficients):
        assert value.isfinite().all()
    assert (log_prob.grad == 0).all()
    assert (coefficients == 0).all()


def test_ratios_within_the_bound_are_exact():
    log_ratio = torch.linspace(-19, 19, 100, dtype=torch.float64)
    torch.testing.assert_close(bounded_ratio(log_ratio, torch.zeros_like(log_ratio)), log_ratio.exp(), rtol=0, atol=0)


def test_shapes_must_agree():
    one, two = torch.zeros(3), torch.zeros(4)
    for call in (
        lambda: score_function_loss(one, two),
        lambda: clipped_surrogate_loss(one, one, two, clip_range=0.1),
        lambda: approximate_kl(one[:, None], one[:, None]),
    ):
        with pytest.raises(ValueError, match="vectors of one length"):
            call()
