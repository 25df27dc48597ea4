"""Distances and weights."""

import sys
from types import SimpleNamespace

import pytest
import torch

from agents.consistency import L1, L2, LPIPS, InverseGap, PseudoHuber, UniformWeight


def no_images(latents):
    raise AssertionError("this metric needs no images")


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 2, 2, generator=generator), torch.randn(3, 4, 2, 2, generator=generator)


def test_distances_are_their_formulas(pair):
    x, y = pair
    for row in range(3):
        away = (x[row] - y[row]).flatten().double()
        assert float(L1()(x, y, no_images)[row]) == pytest.approx(float(away.abs().sum()))
        assert float(L2()(x, y, no_images)[row]) == pytest.approx(float(away @ away))
        c = 0.00054 * 4.0
        assert float(PseudoHuber()(x, y, no_images)[row]) == pytest.approx(float((away @ away + c**2).sqrt() - c))


@pytest.mark.parametrize("metric", [L1(), L2(), PseudoHuber(), PseudoHuber(0.5)], ids=repr)
def test_nothing_is_nearer_than_itself(pair, metric):
    assert metric(pair[0], pair[0], no_images).tolist() == [0.0] * 3


def test_pseudo_huber_s_gradient_is_never_longer_than_one(pair):
    x = (100 * pair[0]).requires_grad_()
    PseudoHuber(0.1)(x, pair[1], no_images).sum().backward()
    assert bool((x.grad.flatten(1).norm(dim=1) <= 1 + 1e-5).all())


def test_weights():
    t, s = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.9999])
    torch.testing.assert_close(InverseGap(1e-2)(t, s), torch.tensor([1.0, 100.0]))
    assert UniformWeight()(t, s).tolist() == [1.0, 1.0]


def test_lpips_sees_images_of_its_size_and_is_named_when_it_is_missing(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusion-gym\[lpips\]'"):
        LPIPS("alex")(*pair, lambda latents: latents[:, :3])

    class Network(torch.nn.Module):
        def forward(self, x, y):
            assert x.shape == (3, 3, 16, 16)
            return (x - y).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda net, verbose: Network()))
    distances = LPIPS("squeeze", size=16)(*pair, lambda latents: latents[:, :3])
    assert distances.shape == (3,)
