import json
import math
import sys
import types

import gymnasium as gym
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents import DDPOSF, AdamW, DenoisingPolicy, Muon, Rollouts
from agents.runs.files import load_optimizer, save_optimizer
from agents.updates import optimizers
from agents.updates.optimizers import MuonWithAdamW, Optimizer
from diffusion_gym.models import load_model
from diffusion_gym.parts import described, made
from tests.tiny import make_tiny_stable_diffusion

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 1e-3, "eps": 1e-8}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)).to(
        memory_format=torch.channels_last
    )


def give_gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_steps_are_those_of_torchs_muon_on_kernels_and_of_adamw_on_the_rest(network):
    own = list(network.parameters())
    matrices = [nn.Parameter(one.detach().flatten(1).clone()) for one in own if one.ndim > 1]
    others = [nn.Parameter(one.detach().clone()) for one in own if one.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=1e-2, momentum=0.9, weight_decay=1e-3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, **OPTIONS)
    optimizer = MuonWithAdamW(own, **OPTIONS)
    for step in range(3):
        give_gradients(own, step)
        for copies, chosen in ((matrices, [p for p in own if p.ndim > 1]), (others, [p for p in own if p.ndim == 1])):
            for copy, parameter in zip(copies, chosen, strict=True):
                copy.grad = parameter.grad.reshape(copy.shape)
        rate = 1e-2 / (step + 1)
        optimizer.param_groups[0]["lr"] = muon.param_groups[0]["lr"] = adamw.param_groups[0]["lr"] = rate
        for one in (optimizer, muon, adamw):
            one.step()
    expected = iter(matrices), iter(others)
    for parameter in own:
        reference = next(expected[0] if parameter.ndim > 1 else expected[1])
        torch.testing.assert_close(parameter.detach().flatten(), reference.detach().flatten(), rtol=0, atol=0)


def test_a_step_is_as_long_in_every_direction_of_a_matrix():
    matrix = nn.Parameter(torch.zeros(16, 64))
    optimizer = MuonWithAdamW([matrix], lr=1.0, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-8)
    torch.manual_seed(0)
    matrix.grad = torch.randn(16, 64) + 10 * torch.ones(16, 64)
    before = torch.linalg.svdvals(matrix.grad)
    optimizer.step()
    after = torch.linalg.svdvals(matrix.detach())
    assert float(before[0] / before[-1]) > 20
    assert float(after[0] / after[-1]) < 2
    assert float(matrix.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.3)


def test_state_survives_a_file(network, tmp_path):
    own = list(network.parameters())
    optimizer = MuonWithAdamW(own, **OPTIONS)
    give_gradients(own, 0)
    optimizer.step()
    save_optimizer(optimizer, tmp_path / "optimizer.safetensors")
    weights = [parameter.detach().clone() for parameter in own]
    give_gradients(own, 1)
    optimizer.step()
    expected = [parameter.detach().clone() for parameter in own]
    with torch.no_grad():
        for parameter, weight in zip(own, weights, strict=True):
            parameter.copy_(weight)
    other = MuonWithAdamW(own, **{**OPTIONS, "lr": 1.0})
    load_optimizer(other, tmp_path / "optimizer.safetensors")
    give_gradients(own, 1)
    other.step()
    for parameter, value in zip(own, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=0)


def test_a_loaded_run_with_muon_goes_on_exactly_where_it_was(make_env, tmp_path):
    model = load_model(make_tiny_stable_diffusion(tmp_path / "model"))
    options = {"optimizer": Muon(), "rollouts": Rollouts(samples=4), "learning_rate": 1e-4, "seed": 3}
    first = DDPOSF(DenoisingPolicy(model, seed=0), make_env(model=model), **options)
    before = [parameter.detach().clone() for parameter in first.policy.parameters()]
    first.learn(12, log_interval=0)
    first.save(tmp_path / "run")
    first.learn(12, log_interval=0, reset_num_timesteps=False)
    resumed = DDPOSF.load(tmp_path / "run", make_env(model=model))
    assert resumed.optimizer == Muon()
    assert isinstance(resumed.updates.optimizer, MuonWithAdamW)
    resumed.learn(12, log_interval=0, reset_num_timesteps=False)
    assert first.num_updates == 2
    for old, new, again in zip(before, first.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(new, again)
        assert not torch.equal(old, new)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_no_processor_has_to_emulate_bf16(monkeypatch, has_bf16):
    """It orthogonalises in float32 where there are no instructions for bfloat16: the same steps but for rounding."""
    monkeypatch.setattr(optimizers, "has_fast_bf16", lambda device: has_bf16)
    weight = nn.Parameter(torch.zeros(8, 12))
    weight.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    optimizer = MuonWithAdamW([weight], **{**OPTIONS, "lr": 1.0})
    seen = set()

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            seen.update(leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            return result

    with Dtypes():
        optimizer.step()
    assert (torch.bfloat16 in seen) == has_bf16
    left, values, right = torch.linalg.svd(weight.grad, full_matrices=False)
    step = -weight.detach() / (0.2 * math.sqrt(12))
    singular = torch.linalg.svdvals(step)
    assert 0.6 < singular.min() < singular.max() < 1.3  # a quintic's five iterations leave them there
    assert ((left.mT @ step @ right.mT).diagonal() > 0.6).all()
    assert values.max() / values.min() > 3


def test_an_optimizer_that_is_no_part_is_refused():
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, num_steps=2, model="mixture", reward="brightness")
    for other in ("adamw", None, torch.optim.SGD):
        with pytest.raises(TypeError, match=r"optimizer must be a part, such as .*\(…\); got "):
            DDPOSF(DenoisingPolicy(env.unwrapped.model), env, rollouts=Rollouts(samples=2), optimizer=other)


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_an_optimizer_is_written_down_and_made_again(kind):
    optimizer = kind(betas=(0.8, 0.95), weight_decay=0.0, warmup_updates=3, max_grad_norm=None, ema_decay=0.9)
    assert made(json.loads(json.dumps(described(optimizer))), Optimizer) == optimizer
    assert made(described(kind()), Optimizer) == kind() != optimizer


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        *(("betas", value) for value in (0.9, [0.9, 0.99], (0.9,), (0.9, 1.0), (-0.1, 0.9))),
        *(("weight_decay", value) for value in (-1.0, True, None)),
        *(("epsilon", value) for value in (0.0, math.nan)),
        *(("warmup_updates", value) for value in (-1, 1.5)),
        *(("max_grad_norm", value) for value in (0.0, math.inf)),
        *(("ema_decay", value) for value in (0, 1, math.nan)),
        ("on_nonfinite", "ignore"),
    ],
)
@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_what_a_field_does_not_allow_is_refused(kind, field, wrong):
    with pytest.raises((TypeError, ValueError), match=f"{field} must be "):
        kind(**{field: wrong})


def test_adamw_is_torchs_with_its_numbers(network):
    optimizer = AdamW(betas=(0.8, 0.95), weight_decay=0.1, epsilon=1e-6).make(network.parameters(), 0.5)
    assert type(optimizer) is torch.optim.AdamW
    expected = {"lr": 0.5, "betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-6}
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected


def test_adamw_in_8_bits_is_bitsandbytes(network, monkeypatch):
    made_with = []
    kind = types.SimpleNamespace(AdamW8bit=lambda parameters, **options: made_with.append(options))
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", kind)
    AdamW(eight_bit=True).make(network.parameters(), 0.5)
    assert made_with == [{"lr": 0.5, "betas": (0.9, 0.999), "weight_decay": 1e-4, "eps": 1e-8}]
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match=r"AdamW\(eight_bit=True\) needs bitsandbytes: pip install"):
        AdamW(eight_bit=True).make(network.parameters(), 0.5)


def test_muon_has_no_8_bits():
    with pytest.raises(TypeError, match="eight_bit"):
        Muon(eight_bit=True)


@pytest.mark.parametrize(
    ("options", "message"), [({"betas": (0.9, 0.99)}, r"betas\[1\]=0.99"), ({"epsilon": 1e-6}, "epsilon")]
)
def test_what_has_no_effect_where_all_weights_are_muons_is_refused(network, options, message):
    matrices = [one for one in network.parameters() if one.ndim > 1]
    with pytest.raises(ValueError, match=f"{message}.* has no effect: it needs a weight that is no matrix"):
        Muon(**options).make(matrices, 1e-2)
    assert isinstance(Muon(**options).make(network.parameters(), 1e-2), MuonWithAdamW)


def test_the_learning_rate_is_warmed_up():
    rates = [AdamW(warmup_updates=4).warmed(0.8, done) for done in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert [AdamW().warmed(0.8, done) for done in range(2)] == [0.8, 0.8]
