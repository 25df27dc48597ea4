"""Text encoders and autoencoders that stay on the CPU, in half the memory, or go once the prompts are encoded."""

import pickle
import weakref

import pytest
import torch

from diffusion_gym.models import load_model
from diffusion_gym.models.offloading import lent
from tests.families import FAMILIES

PROMPTS = ["a cat", "a fox"]
ELSEWHERE = torch.device("meta")  # a device that computes shapes alone


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return family.write(tmp_path_factory.mktemp(family.name) / "model")


def devices(network):
    return {tensor.device for tensor in (*network.parameters(), *network.buffers())}


def text_encoders(model):
    return {name: value for name, value in vars(model).items() if name.startswith("_text_encoder")}


def test_weights_come_back_as_they_were(folder):
    network = load_model(folder).denoiser
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in network.named_parameters()}
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), lent(network, ELSEWHERE) as device:
            assert device == ELSEWHERE
            assert devices(network) == {ELSEWHERE}
        assert {name: (tensor.data_ptr(), tensor._version) for name, tensor in network.named_parameters()} == before
    with lent(network, None) as device:
        assert device == torch.device("cpu")


def test_weights_come_back_after_an_error(folder):
    network = load_model(folder).denoiser
    with pytest.raises(RuntimeError, match="out of memory"), lent(network, ELSEWHERE):
        raise RuntimeError("out of memory")
    assert devices(network) == {torch.device("cpu")}


def test_a_weight_with_two_names_is_lent_once(folder):
    network = torch.nn.Module()
    network.first, network.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    network.second.weight = network.first.weight
    with lent(network, ELSEWHERE):
        assert network.second.weight is network.first.weight
    assert network.second.weight is network.first.weight


def test_an_offloaded_model_computes_on_the_device_and_lives_on_the_cpu(folder, family):
    model = load_model(folder, image_size=family.told_size, offload=True)
    plain = load_model(folder, image_size=family.told_size)
    for key, value in plain.encode_prompts(PROMPTS).items():
        assert torch.equal(model.encode_prompts(PROMPTS)[key], value)
    again = pickle.loads(pickle.dumps(model))
    assert again.offload

    again.device = ELSEWHERE
    latents = torch.zeros(2, *model.latent_shape, device=ELSEWHERE)
    assert again.decode(latents).device == ELSEWHERE
    assert again.encode(torch.zeros(2, *model.image_shape, device=ELSEWHERE)).device == ELSEWHERE
    assert {value.device for value in again.encode_prompts(PROMPTS).values()} == {ELSEWHERE}
    assert len(text_encoders(again)) > 0
    for network in (again._vae, *text_encoders(again).values()):
        assert devices(network) == {torch.device("cpu")}
    pickle.dumps(again)  # which refuses weights that were changed


def test_released_text_encoders_are_gone_until_they_are_needed(folder):
    model = load_model(folder)
    embeddings = model.encode_prompts(PROMPTS)
    networks = [weakref.ref(network) for network in text_encoders(model).values()]
    model.release_text_encoders()
    assert all(network() is None for network in networks)
    assert model.encode_prompts(PROMPTS).keys() == embeddings.keys()
    assert text_encoders(model) == {}
    pickle.dumps(model)
    model.encode_prompts(["a dog"])
    assert len(text_encoders(model)) == len(networks) > 0


def test_what_has_no_text_encoder_releases_none_and_has_nothing_to_offload():
    load_model("mixture").release_text_encoders()
    with pytest.raises(ValueError, match="offload=True has no effect: 'mixture' has no text encoder"):
        load_model("mixture", offload=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_text_encoders_of_lower_precision_take_half_the_memory_and_say_nearly_the_same(folder, dtype):
    plain, model = load_model(folder), load_model(folder, text_encoder_dtype=dtype)
    embeddings = model.encode_prompts(PROMPTS)
    for key, value in plain.encode_prompts(PROMPTS).items():
        assert embeddings[key].dtype == value.dtype == torch.float32
        error = float((embeddings[key] - value).norm())
        assert error == 0 or value.any()
        assert error <= float(value.norm()) * 10 * torch.finfo(getattr(torch, dtype)).eps
    assert any(not torch.equal(embeddings[key], value) for key, value in plain.encode_prompts(PROMPTS).items())
    for name, network in text_encoders(model).items():
        shares = {parameter.element_size() / 4 for parameter in network.parameters()}
        has_large_numbers = dtype == "float16" and "T5" in type(network).__name__
        assert shares == ({0.5, 1.0} if has_large_numbers else {0.5}), name
    again = pickle.loads(pickle.dumps(model))
    assert again.text_encoder_dtype == getattr(torch, dtype)
    assert all(torch.equal(again.encode_prompts(PROMPTS)[key], value) for key, value in embeddings.items())
    assert again.denoiser.dtype == torch.float32


def test_a_text_encoders_precision_is_one_and_has_an_effect(folder):
    with pytest.raises(ValueError, match=r"text_encoder_dtype=torch\.float16 has no effect: 'mixture' has no text enc"):
        load_model("mixture", text_encoder_dtype="float16")
    with pytest.raises(ValueError, match=r"text_encoder_dtype must be a floating-point dtype .*, got 'half a byte'"):
        load_model(folder, text_encoder_dtype="half a byte")
