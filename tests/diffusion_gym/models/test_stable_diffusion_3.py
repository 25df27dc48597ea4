"""What is particular to Stable Diffusion 3: its text encoders, of which T5 can be left out, and its sizes."""

import json
import pickle
import shutil
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from diffusers import DiffusionPipeline
from gymnasium.envs.registration import EnvSpec
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

import diffusion_gym  # noqa: F401
from agents import DenoisingPolicy, LoRA
from diffusion_gym.models import load_model
from diffusion_gym.models.base import DiffusionModel
from tests.tiny import _write_clip_text, make_tiny_stable_diffusion_3

PROMPTS = ["a cat", "an ant on a pink background"]
T5 = "text_encoder_3/model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_tiny_stable_diffusion_3(tmp_path_factory.mktemp("folders") / "tiny")


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


def change(file: Path, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def pipelines_embeddings(folder, **parts):
    pipeline = DiffusionPipeline.from_pretrained(folder, **parts).to(torch.float32)
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS)
    return {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }


def test_embeddings_are_the_pipelines(original):
    found, expected = load_model(original).encode_prompts(PROMPTS), pipelines_embeddings(original)
    assert found["prompt_embeds"].shape == (2, 16 + 256, 80)
    assert found["pooled_prompt_embeds"].shape == (2, 48)
    assert {*found} == {*expected}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


def test_t5_can_be_left_out(folder, tmp_path):
    """As the pipeline with text_encoder_3=None; its files need not be there, for copies of the model neither."""
    expected = pipelines_embeddings(folder, text_encoder_3=None, tokenizer_3=None)
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(FileNotFoundError, match="text_encoder_3 has no config"):
        load_model(folder)
    model = load_model(folder, without=("text_encoder_3",))
    DenoisingPolicy(model, adaptation=LoRA(rank=1)).save(tmp_path / "policy")
    for same in (model, pickle.loads(pickle.dumps(model)), DenoisingPolicy.load(tmp_path / "policy").model):
        assert same.without == ("text_encoder_3",)
        found = same.encode_prompts(PROMPTS)
        assert not found["prompt_embeds"][:, 16:].any()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("env_id", ["DenoisingMDP-v0", "TimePredictionMDP-v0"])
def test_environments_leave_out_what_a_model_can_do_without(original, env_id):
    arguments = {"without": ("text_encoder_3",), "offload": True, "text_encoder_dtype": torch.bfloat16}
    env = gym.make(env_id, model=str(original), reward="brightness", **arguments)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    for model in (env.unwrapped.model, again.unwrapped.model):
        assert {name: getattr(model, name) for name in arguments} == arguments
    assert gym.make(env_id, model=model, **arguments).unwrapped.model is model
    for name, value in {"without": (), "offload": False, "text_encoder_dtype": "float16"}.items():
        with pytest.raises(ValueError, match=f"{name}=.* differs from the loaded model's"):
            gym.make(env_id, model=model, **{name: value})
    with pytest.raises(TypeError, match="offload must be True or False, got 'no'"):
        gym.make(env_id, model=str(original), offload="no")


def test_only_what_a_model_can_do_without_is_left_out(original):
    for source, part in (("emoji", "text_encoder"), ("mixture", "text_encoder_3"), (original, "vae")):
        with pytest.raises(ValueError, match=rf"without='{part}': no part that .* can do without, which are: \w+"):
            load_model(source, without=(part,))
    with pytest.raises(TypeError, match="without must be a sequence of names"):
        load_model(original, without="text_encoder_3")


def test_the_hub_is_not_asked_for_what_is_left_out(original, monkeypatch):
    asked = {}

    def download(source, **arguments):
        asked.update(arguments)
        return str(original)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    load_model("owner/name", without=("text_encoder_3",))
    assert asked["text_encoder_3"] is None
    assert load_model("owner/name").without == ()


@pytest.mark.filterwarnings("ignore:.*prompts are longer")
def test_the_packages_key_says_how_many_tokens_t5_has(folder):
    for tokens in (0, 3, 512):
        change(folder / "model_index.json", _max_sequence_length=tokens)
        model: DiffusionModel = load_model(folder)
        embeds = model.encode_prompts(["a cat"])["prompt_embeds"]
        assert embeds.shape == (1, 16 + tokens, 80)
        assert bool(embeds[:, 16:].any()) == (tokens > 0)
    for wrong in (-1, 513, 2.0, "256", None, True):
        change(folder / "model_index.json", _max_sequence_length=wrong)
        with pytest.raises(
            ValueError, match=r"model_index\.json: _max_sequence_length must be a whole number from 0 to"
        ):
            load_model(folder)


@pytest.mark.filterwarnings("ignore:.*prompts are longer")
def test_t5_has_its_tokens_whatever_its_tokenizer_says(folder, original):
    change(folder / "tokenizer_3" / "tokenizer_config.json", model_max_length=20)
    found, expected = (load_model(path).encode_prompts(PROMPTS)["prompt_embeds"] for path in (folder, original))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_embedding_of_t5_may_be_stored_by_either_of_its_names(folder, original):
    weights = load_file(folder / T5)
    shared = weights.pop("shared.weight")
    save_file({**weights, "encoder.embed_tokens.weight": shared}, folder / T5, {"format": "pt"})
    found, expected = (load_model(path).encode_prompts(PROMPTS)["prompt_embeds"] for path in (folder, original))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    save_file(weights, folder / T5, {"format": "pt"})
    with pytest.raises(ValueError, match=r"text_encoder_3.model.safetensors lacks shared\.weight"):
        load_model(folder)


@pytest.mark.parametrize("size", [18, (16, 22), (2, 16)])
def test_images_are_whole_patches(original, size):
    with pytest.raises(ValueError, match=r"image_size must be a multiple of 4 above 0"):
        load_model(original, image_size=size)


def test_images_are_not_larger_than_the_positions_that_are_known(original):
    assert load_model(original, image_size=(32, 32)).latent_shape == (16, 16, 16)
    with pytest.raises(ValueError, match=r"image_size must be at most 32 in height and width for .*, got \(16, 36\)"):
        load_model(original, image_size=(16, 36))


def test_text_encoders_that_do_not_fit_are_named(folder):
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    _write_clip_text(folder, "text_encoder", CLIPTextModelWithProjection, seed=0, projection_dim=16)
    with pytest.raises(
        ValueError, match="width is 40, but the transformer's pooled_projection_dim 48: they do not belong"
    ):
        load_model(folder)
    change(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=8)
    with pytest.raises(ValueError, match="text_encoder takes 16 tokens and text_encoder_2 8"):
        load_model(folder)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("text_encoder", ["transformers", "CLIPTextModel"]),
        ("text_encoder_3", ["transformers", "T5ForConditionalGeneration"]),
        ("tokenizer_3", [None, None]),
        ("transformer", ["diffusers", "FluxTransformer2DModel"]),
    ],
)
def test_parts_of_other_classes_are_refused_by_name(folder, part, value):
    change(folder / "model_index.json", **{part: value})
    with pytest.raises(ValueError, match=rf"model_index\.json: (the )?{part} "):
        load_model(folder)


def test_an_autoencoder_without_a_shift_is_refused(folder):
    change(folder / "vae" / "config.json", shift_factor=None)
    with pytest.raises(ValueError, match=r"vae/config\.json: shift_factor must be a number for this package, got None"):
        load_model(folder)


def test_a_lora_file_of_another_alpha_is_refused(original, tmp_path):
    model = load_model(original)
    one, other = (DenoisingPolicy(model, adaptation=LoRA(rank=2, alpha=alpha)) for alpha in (2.0, 4.0))
    model.save_lora(one.denoiser, tmp_path)
    model.load_lora(one.denoiser, tmp_path)
    with pytest.raises(ValueError, match=r"has lora_alpha \[2\.0\], this denoiser's LoRA layers 4\.0"):
        model.load_lora(other.denoiser, tmp_path)


def test_a_table_of_positions_of_another_size_is_refused(folder):
    config = folder / "transformer" / "config.json"
    change(config, pos_embed_max_size=96)
    with pytest.raises(
        ValueError, match=r"pos_embed\.pos_embed of shape \[1, 64, 32\], config.json beside it describes"
    ):
        load_model(folder)
