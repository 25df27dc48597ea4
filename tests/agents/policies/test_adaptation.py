import math

import pytest
import torch

from agents import Full, LoRA, Only
from agents.policies import Adaptation
from diffusion_gym.models import load_model
from diffusion_gym.parts import described, made
from tests.tiny import make_tiny_stable_diffusion


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(make_tiny_stable_diffusion(tmp_path_factory.mktemp("tiny") / "model"))


def network_of(adaptation, model, seed=0):
    return adaptation.network(model, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "adaptation", [Full(), Only("bias", "norm"), LoRA(), LoRA(rank=2, alpha=0.5, targets=("to_k", "to_v"))], ids=repr
)
def test_an_adaptation_comes_back_from_its_description(adaptation, model):
    assert made(described(adaptation), Adaptation) == adaptation
    complete = adaptation.resolved(model)
    assert made(described(complete), Adaptation) == complete == complete.resolved(model)


def test_lora_leaves_scale_and_layers_to_the_rank_and_the_model(model):
    assert LoRA(rank=3).resolved(model) == LoRA(rank=3, alpha=3, targets=model.lora_targets)
    given = LoRA(rank=3, alpha=8, targets=["to_k"])
    assert given.resolved(model) == given
    assert (given.alpha, given.targets) == (8.0, ("to_k",))
    scales = {layer.scaling["default"] for layer in network_of(given, model).modules() if hasattr(layer, "lora_A")}
    assert scales == {8 / 3}


def test_a_copy_trains_what_it_says_and_shares_nothing(model):
    frozen = {parameter.data_ptr() for parameter in model.denoiser.parameters()}
    for adaptation, is_trained in ((Full(), lambda name: True), (Only("bias"), lambda name: "bias" in name)):
        network = network_of(adaptation, model)
        assert frozen.isdisjoint(parameter.data_ptr() for parameter in network.parameters())
        assert {name for name, p in network.named_parameters() if p.requires_grad} == {
            name for name, _ in network.named_parameters() if is_trained(name)
        }
    assert not any(parameter.requires_grad for parameter in model.denoiser.parameters())


def test_loras_first_weights_belong_to_the_generator_and_leave_torchs_alone(model):
    state = torch.random.get_rng_state()
    one, same, other = (dict(network_of(LoRA(), model, seed).named_parameters()) for seed in (1, 1, 2))
    drawn = [name for name in one if "lora_A" in name]
    assert drawn
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in drawn)
    assert all((one[name] == 0).all() for name in one if "lora_B" in name)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_arithmetic_without_autocast_is_that_of_the_weights():
    half = load_model("mixture", dtype="float16")
    assert [kind.arithmetic(half) for kind in (Full(), Only("bias"), LoRA())] == [
        torch.float32,
        torch.float32,
        torch.float16,
    ]


def test_whole_networks_read_each_other_and_lora_its_like():
    assert Full().reads(Only("bias"))
    assert Only("bias").reads(Full())
    assert LoRA(2).reads(LoRA(2))
    assert not LoRA(2).reads(LoRA(3))
    assert not LoRA().reads(Full())
    assert not Full().reads(LoRA())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be an integer of at least 1, got 0"),
        ({"rank": 2.0}, ValueError, "rank must be an integer"),
        ({"alpha": math.nan}, ValueError, r"alpha must be a finite number in \(0, inf\), got nan"),
        ({"alpha": 0.0}, ValueError, "alpha must be a finite number"),
        ({"targets": "to_k"}, TypeError, r"targets must be a sequence of names .* got 'to_k'"),
        ({"targets": (1,)}, TypeError, "targets must be a sequence of names"),
        ({"targets": ()}, ValueError, "targets must name at least one layer"),
    ],
)
def test_wrong_arguments_of_lora_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        LoRA(**arguments)


@pytest.mark.parametrize(
    ("names", "error"), [((), ValueError), (("",), ValueError), ((("bias", "norm"),), TypeError), ((None,), TypeError)]
)
def test_wrong_names_of_weights_are_refused(names, error):
    with pytest.raises(error, match=r'such as Only\("bias", "norm"\)'):
        Only(*names)
