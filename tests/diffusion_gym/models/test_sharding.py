"""What one process can know of shared weights; `tests/agents/updates/test_sharing_processes.py` has two."""

import pytest
import torch
from torch import nn

from diffusion_gym.models import load_model, sharding


@pytest.fixture
def launched(monkeypatch):
    """The variables that `accelerate launch --use_fsdp --fsdp_version 2` sets for two processes."""
    values = {
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_the_launcher_asks_for_it(launched):
    assert sharding.is_asked_for()
    assert load_model("mixture").is_sharded


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "1"), ("ACCELERATE_USE_FSDP", "false")])
def test_one_process_alone_divides_nothing(launched, name, value):
    launched.setenv(name, value)
    assert not sharding.is_asked_for()
    model = load_model("mixture")
    assert not model.is_sharded
    launched.setattr(sharding, "shard", None)
    launched.setattr(sharding, "runner", None)
    model.denoise(torch.zeros(1, *model.latent_shape), torch.ones(1), model.encode_prompts([""]), guidance_scale=1.0)


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("FSDP_VERSION", "1", "--fsdp_version 2"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "--fsdp_reshard_after_forward true"),
        ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", r"DenoisingPolicy\(gradient_checkpointing=True\)"),
    ],
)
def test_options_that_are_not_understood_are_refused(launched, name, value, cure):
    launched.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be .*: give {cure}"):
        load_model("mixture")


def test_processes_that_have_not_met_are_named(launched):
    model = load_model("mixture")
    with pytest.raises(RuntimeError, match=r"have not met: create agents\.Processes\(\) first"):
        model.denoiser  # noqa: B018


def test_whole_weights_are_left_as_they_are():
    network = nn.Linear(2, 3)
    assert sharding.whole_network(network) is network
    assert sharding.whole_tensors({"weight": network.weight}) == {"weight": network.weight}
    values = torch.ones(3, 2)
    assert sharding.like(network.weight, values) is values
    sharding.load_weights(network, {"weight": values, "bias": torch.zeros(3)})
    assert torch.equal(network.weight, values)
