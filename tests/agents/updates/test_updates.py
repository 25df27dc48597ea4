"""From a loss to new weights: what `Updates` does is what a loop over torch's own optimizer does."""

import pytest
import torch
from torch import nn

from agents import AdamW, Muon, Processes
from agents.updates.updates import Updates

ADAMW = AdamW()


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in ((4, 3), (4,))]


def make(weights, part=ADAMW, *, learning_rate=lambda: 1e-2):
    return Updates(
        weights, part, learning_rate=learning_rate, processes=Processes(), scale_losses=False, where=lambda: "here"
    )


def loss_of(weights, number, *, factor=1.0):
    """Return a loss whose gradient depends on its number alone."""
    generator = torch.Generator().manual_seed(100 + number)
    return factor * sum((one * torch.randn(one.shape, generator=generator)).sum() for one in weights)


def gradient_of(weights, *numbers):
    loss = sum(loss_of(weights, number) for number in numbers)
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, weights)])


def flat(weights):
    return torch.cat([weight.detach().flatten() for weight in weights])


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_updates_are_those_of_torchs_optimizer(weights, max_grad_norm):
    """Accumulated over two losses each, clipped, with a learning rate of its own for every update."""
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    adamw = torch.optim.AdamW(others, lr=1.0, weight_decay=1e-4)
    rates = iter([3e-2, 2e-2, 1e-2, 5e-3])
    updates = make(weights, AdamW(max_grad_norm=max_grad_norm), learning_rate=lambda: next(rates))
    for update, rate in enumerate([2e-2, 1e-2, 5e-3]):
        for number in (2 * update, 2 * update + 1):
            updates.backward(loss_of(weights, number))
            loss_of(others, number).backward()
        expected = torch.nn.utils.clip_grad_norm_(others, max_grad_norm or float("inf"))
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        adamw.zero_grad()
        assert float(updates.apply()) == pytest.approx(float(expected), rel=1e-12)
        assert all(weight.grad is None for weight in weights)
        torch.testing.assert_close(flat(weights), flat(others), rtol=1e-12, atol=0)
    assert updates.num_updates == 3


@pytest.mark.parametrize(("max_grad_norm", "share"), [(None, 1.0), (1e3, 1.0), (0.5, 0.5)])
def test_the_norm_is_that_before_clipping_and_the_hook_sees_the_gradient_after_it(weights, max_grad_norm, share):
    updates = make(weights, AdamW(max_grad_norm=max_grad_norm))
    seen = []
    updates.optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([w.grad.flatten() for w in weights])))
    expected = gradient_of(weights, 0)
    updates.backward(loss_of(weights, 0))
    assert float(updates.apply()) == pytest.approx(float(expected.norm()), rel=1e-12)
    scale = share / float(expected.norm()) if share < 1 else 1.0
    torch.testing.assert_close(seen[0], scale * expected, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm


def test_the_learning_rate_is_warmed_up_update_by_update(weights):
    updates = make(weights, AdamW(warmup_updates=3), learning_rate=lambda: 0.6)
    used = []
    updates.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    for number in range(5):
        assert updates.learning_rate == pytest.approx(min(1, (number + 1) / 3) * 0.6)
        updates.backward(loss_of(weights, number))
        updates.apply()
    assert used == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.6])


def test_what_is_cleared_leaves_nothing_behind(weights):
    """Neither its gradient nor that its loss was infinite."""
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    updates, unbroken = make(weights), make(others)
    updates.backward(loss_of(weights, 7, factor=torch.inf))
    updates.clear()
    assert all(weight.grad is None for weight in weights)
    for one, trained in ((updates, weights), (unbroken, others)):
        one.backward(loss_of(trained, 0))
        one.apply()
    assert torch.equal(flat(weights), flat(others))


@pytest.mark.parametrize("culprit", ["loss", "gradient"])
def test_an_update_that_is_not_finite_says_where_it_was_and_changes_nothing(weights, culprit):
    updates = make(weights, AdamW(ema_decay=0.5))
    updates.backward(loss_of(weights, 0))
    updates.apply()
    before = flat(weights)
    updates.backward(loss_of(weights, 1) + (torch.nan if culprit == "loss" else 0))
    if culprit == "gradient":
        weights[0].grad[0, 0] = torch.inf
    message = rf'the {culprit} of an update was NaN or infinite \(here, after 1 updates\).*on_nonfinite="skip"'
    with pytest.raises(FloatingPointError, match=message):
        updates.apply()
    assert torch.equal(flat(weights), before)
    assert updates.num_updates == 1
    updates.backward(loss_of(weights, 1))
    updates.apply()
    assert updates.num_updates == 2


def test_a_skipped_update_is_not_counted_and_not_averaged(weights):
    updates = make(weights, AdamW(ema_decay=0.5, on_nonfinite="skip", warmup_updates=4))
    updates.backward(loss_of(weights, 0))
    updates.apply()
    rate = updates.learning_rate
    with updates.average.applied():
        average = flat(weights)
    updates.backward(loss_of(weights, 1, factor=torch.nan))
    with pytest.warns(UserWarning, match="NaN or infinite"):
        updates.apply()
    assert (updates.num_updates, updates.guard.num_skipped, updates.num_steps_around) == (1, 1, 0)
    assert updates.learning_rate == rate
    with updates.average.applied():
        assert torch.equal(flat(weights), average)


@pytest.mark.parametrize("part", [AdamW(), Muon()])
def test_steps_that_go_around_are_counted(part):
    weights = [nn.Parameter(torch.ones(3))]
    updates = make(weights, part)
    for _ in range(2):
        updates.backward(loss_of(weights, 0))
        updates.apply()
    assert updates.num_steps_around == 0
    weights[0].sum().backward()
    updates.optimizer.step()
    assert updates.num_steps_around == 1
    assert updates.num_updates == 2


def test_there_is_an_average_only_where_one_was_asked_for(weights):
    assert make(weights).average is None
    assert make(weights, AdamW(ema_decay=0.9)).average is not None
