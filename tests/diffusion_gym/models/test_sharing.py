"""What a model remembers, shares and lets go: its prompts, its weights, its folder."""

import copy
import gc
import os
import pickle
import shutil
import weakref

import diffusers
import gymnasium as gym
import pytest
import torch

from diffusion_gym.models import base, load_model
from diffusion_gym.models.base import to_device
from tests.tiny import EMOJI, make_tiny_stable_diffusion


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_tiny_stable_diffusion(tmp_path_factory.mktemp("shared") / "tiny")


@pytest.fixture
def asked(monkeypatch):
    """The Hub's stand-in: it notes what it is asked for, and always gives the embedded model."""
    requests = []
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "download", lambda source, **options: requests.append(source) or str(EMOJI)
    )
    return requests


def use(model):
    """Load all that a model has."""
    latents = torch.zeros(1, *model.latent_shape)
    conditioning = model.encode_prompts(["a cat" if model.source != "mixture" else "anything"])
    model.denoise(latents, torch.tensor([500.0]), conditioning, guidance_scale=2.0)
    model.decode(latents)
    return conditioning


def test_copies_are_the_model_itself_and_never_ask_the_hub(asked):
    model = load_model("somebody/some-model")
    env = gym.make("DenoisingMDP-v0", model=model, num_steps=2, reward="brightness")
    assert copy.copy(model) is copy.deepcopy(model) is env.spec.kwargs["model"] is model
    again = pickle.loads(pickle.dumps(model))
    assert (again.source, again.path) == (model.source, model.path)
    env.reset(seed=0)
    assert asked == ["somebody/some-model"]


def test_pickles_keep_the_settings(folder):
    model = load_model(folder, image_size=32, dtype="bfloat16")
    model.default_guidance_scale, model.default_prompts, model.lora_targets = 2.5, ("a cat",), ("to_k",)
    model.schedule.timesteps(4)
    model.schedule.alpha(torch.tensor([3.0]))
    again = pickle.loads(pickle.dumps(model))
    for name in (
        "default_guidance_scale",
        "default_prompts",
        "lora_targets",
        "dtype",
        "latent_shape",
        "prediction_type",
    ):
        assert getattr(again, name) == getattr(model, name)
    assert torch.equal(again.schedule.alphas_cumprod, model.schedule.alphas_cumprod)


@pytest.mark.parametrize("network", ["denoiser", "_vae", "_text_encoder"])
def test_changed_weights_are_not_lost_in_a_pickle(folder, network):
    model = load_model(folder)
    use(model)
    pickle.dumps(model)
    with torch.no_grad():
        next(getattr(model, network).parameters()).mul_(2)
    with pytest.raises(ValueError, match=r"the weights of the model '.*' were changed after it was loaded"):
        pickle.dumps(model)
    assert copy.deepcopy(model) is model


def test_replaced_weights_are_not_lost_in_a_pickle(folder):
    model = load_model(folder)
    weights = {name: value + 1 for name, value in model.denoiser.state_dict().items()}
    model.denoiser.load_state_dict(weights, assign=True)
    with pytest.raises(ValueError, match="were changed after it was loaded"):
        pickle.dumps(model)


def test_relative_paths_are_resolved_when_a_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model = load_model(folder.name)
    monkeypatch.chdir(tmp_path)
    assert model.source == str(model.path) == os.path.abspath(folder)
    again = pickle.loads(pickle.dumps(model))
    assert use(again).keys() == use(model).keys()


def test_a_pickle_whose_folder_is_gone_says_so(folder, tmp_path, asked):
    moved = shutil.copytree(folder, tmp_path / "moved")
    pickled = pickle.dumps(load_model(moved))
    shutil.rmtree(moved)
    with pytest.raises(FileNotFoundError, match=r"moved has no model_index\.json"):
        pickle.loads(pickled)
    assert asked == []


@pytest.mark.parametrize("source", ["emoji", "mixture", "folder"])
def test_models_are_freed_when_they_are_dropped(source, folder):
    model = load_model(folder if source == "folder" else source)
    use(model)
    alive = [weakref.ref(model), weakref.ref(model.denoiser), weakref.ref(next(model.denoiser.parameters()))]
    gc.disable()
    try:
        del model
        assert [reference() for reference in alive] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("source", ["folder", "mixture"])
def test_a_first_use_in_inference_mode_spoils_no_later_training(source, folder):
    with torch.inference_mode():
        model = load_model(folder if source == "folder" else source)
        use(model)
    conditioning = use(model)
    assert not any(tensor.is_inference() for tensor in conditioning.values())
    tensors = [*model.denoiser.parameters(), *model.denoiser.buffers(), model.schedule.alphas_cumprod]
    assert not any(tensor.is_inference() for tensor in tensors)
    trained = copy.deepcopy(model.denoiser).requires_grad_(True)
    for scale in (1.0, 2.0):
        prediction = model.denoise(
            torch.ones(1, *model.latent_shape),
            torch.tensor([500.0]),
            conditioning,
            guidance_scale=scale,
            denoiser=trained,
        )
        prediction.epsilon.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in trained.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("source", ["folder", "mixture"])
def test_the_default_dtype_of_others_changes_nothing(source, folder):
    source = folder if source == "folder" else source
    expected = use(load_model(source))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = load_model(source)
        conditioning = use(model)
        images = model.decode(torch.zeros(1, *model.latent_shape, dtype=torch.float32))
        assert model.latent_shape == load_model(source).latent_shape
    finally:
        torch.set_default_dtype(before)
    assert images.dtype == torch.float32
    assert {value.dtype for value in conditioning.values()} == {torch.float32}
    assert {tensor.dtype for tensor in model.denoiser.parameters()} == {torch.float32}
    assert model.schedule.alphas_cumprod.dtype == torch.float32
    for key, value in expected.items():
        torch.testing.assert_close(conditioning[key], value)


@pytest.fixture
def encoded(monkeypatch, folder):
    """A model, and the texts that it has encoded so far."""
    model, texts = load_model(folder), []
    encode = model._encode
    monkeypatch.setattr(model, "_encode", lambda prompts: texts.extend(prompts) or encode(prompts))
    return model, texts


def test_only_prompts_that_are_new_are_encoded(encoded):
    model, texts = encoded
    model.encode_prompts(["a cat", "a dog", "a cat"], "dark")
    assert texts == ["a cat", "a dog", "dark"]
    both = model.encode_prompts(["a dog", "a fox"], "a cat")
    assert texts == ["a cat", "a dog", "dark", "a fox"]
    assert torch.equal(both["negative_prompt_embeds"][1], model.encode_prompts(["a cat"])["prompt_embeds"][0])


def test_an_embedding_does_not_depend_on_the_others(folder):
    prompts = [f"a cat number {number}" for number in range(20)]
    together = load_model(folder).encode_prompts(prompts)["prompt_embeds"]
    model = load_model(folder)
    for index in (7, 3, 19):
        assert torch.equal(model.encode_prompts([prompts[index]])["prompt_embeds"][0], together[index])


def test_what_was_not_asked_for_longest_is_forgotten_first(encoded, monkeypatch):
    model, texts = encoded
    row = model.encode_prompts(["a"])["prompt_embeds"].nbytes  # and "", the negative prompt
    monkeypatch.setattr(base, "_CACHED_PROMPT_BYTES", 3 * row)
    model.encode_prompts(["b"])
    model.encode_prompts(["a"])
    model.encode_prompts(["c"])  # "b" goes
    texts.clear()
    model.encode_prompts(["a", "c"])
    assert texts == []
    assert model.encode_prompts(["b", "a", "d", "e"])["prompt_embeds"].shape[0] == 4  # more than are kept otherwise
    texts.clear()
    model.encode_prompts(["b", "a", "d", "e"])
    assert texts == []
    model.encode_prompts(["e"])
    assert len(model._rows) == 3
    assert sum(value.untyped_storage().nbytes() for rows in model._rows.values() for value in rows.values()) == 3 * row


def held(model):
    """Return the bytes of all embeddings that a model keeps."""
    _, table = model._table
    kept = [*table.values(), *(value for rows in model._rows.values() for value in rows.values())]
    return sum({value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in kept}.values())


def test_a_table_is_made_once_and_its_embeddings_are_held_once(encoded):
    model, texts = encoded
    prompts = ["a cat", "a dog", "a cat", "a fox"]
    expected = model.encode_prompts(prompts, "dark")
    row = expected["prompt_embeds"][0].nbytes
    texts.clear()
    table = model.prompt_table(prompts, "dark")
    assert model.prompt_table(list(prompts), "dark") is table
    assert all(torch.equal(table[key], value) for key, value in expected.items())
    assert held(model) == (len(prompts) + 1) * row
    assert torch.equal(model.encode_prompts(["a fox"], "dark")["prompt_embeds"], expected["prompt_embeds"][3:])
    other = model.prompt_table(["a dog"], "dark")
    assert other is not table
    assert torch.equal(other["prompt_embeds"], expected["prompt_embeds"][1:2])
    assert texts == []
    assert held(model) == 4 * row  # of three prompts and the negative one: none of the old table


def test_no_prompts_are_no_rows(encoded):
    model, _ = encoded
    assert {key: value.shape for key, value in model.encode_prompts([]).items()} == {
        "prompt_embeds": (0, 16, 128),
        "negative_prompt_embeds": (0, 16, 128),
    }


@pytest.mark.parametrize(("prompts", "negative"), [("a cat", ""), ([None], ""), ([3], ""), (["a cat"], None)])
def test_what_is_no_text_is_named(encoded, prompts, negative):
    with pytest.raises(TypeError, match="prompts must be a sequence of texts, and negative_prompt a text"):
        encoded[0].encode_prompts(prompts, negative)


def test_devices_are_equal_whatever_their_index_says(folder):
    assert to_device("cpu:0") == to_device("cpu") == to_device(torch.device("cpu", 0)) == torch.device("cpu")
    assert to_device("meta") == torch.empty(0, device="meta").device
    model = load_model(folder, device="cpu:0")
    assert gym.make("DenoisingMDP-v0", model=model, device="cpu").unwrapped.model is model
