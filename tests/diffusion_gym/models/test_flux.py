"""What is particular to Flux: packed latents, a guidance scale that the network is told or not, and its size."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusion_gym.models import load_model
from tests.tiny import make_tiny_flux

PROMPTS = ["a cat", "an ant on a pink background"]


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return make_tiny_flux(tmp_path_factory.mktemp("folders") / "dev")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    return make_tiny_flux(tmp_path_factory.mktemp("folders") / "schnell", is_schnell=True)


@pytest.fixture
def folder(dev, tmp_path):
    return Path(shutil.copytree(dev, tmp_path / "model"))


def change(file: Path, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_embeddings_are_the_pipelines(dev):
    found = load_model(dev).encode_prompts(PROMPTS)
    pipeline = DiffusionPipeline.from_pretrained(dev).to(torch.float32)
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(PROMPTS)
    assert {key: value.shape for key, value in found.items()} == {
        "prompt_embeds": (2, 512, 48),
        "pooled_prompt_embeds": (2, 32),
    }
    torch.testing.assert_close(found["prompt_embeds"], embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["pooled_prompt_embeds"], pooled, rtol=1e-5, atol=1e-5)


def test_guidance_and_its_default_are_the_checkpoints(dev, schnell):
    told, distilled = load_model(dev), load_model(schnell)
    assert (told.guidance, told.default_guidance_scale) == ("embedded", 3.5)
    assert (distilled.guidance, distilled.default_guidance_scale) == ("none", 1.0)
    with pytest.raises(ValueError, match=r"guidance_scale=3\.5 has no effect: .* was distilled for one scale"):
        distilled.guidance_scale_of(3.5)
    for model in (told, distilled):
        with pytest.raises(ValueError, match=r"negative_prompt='dark' has no effect"):
            model.encode_prompts(PROMPTS, "dark")
        again = pickle.loads(pickle.dumps(model))
        assert (again.guidance, again.default_guidance_scale) == (model.guidance, model.default_guidance_scale)


def test_the_network_is_told_the_guidance_scale(dev):
    model = load_model(dev, image_size=16)
    latents, t = torch.randn(1, *model.latent_shape), torch.full((1,), 0.7)
    conditioning = model.encode_prompts(PROMPTS[:1])
    with torch.no_grad():
        first, other = (model.denoise(latents, t, conditioning, guidance_scale=scale).x0 for scale in (1.0, 6.0))
    assert (first - other).abs().max() > 1e-4


def test_the_default_size_is_the_pipelines_and_the_shift_is_that_of_the_size(dev):
    """128×128 latents are 4,096 tokens, where the shift is e^max_shift; 16 pixels are 16 tokens."""
    default, small = load_model(dev), load_model(dev, image_size=16)
    assert default.image_size == (256, 256)
    assert default.latent_shape == (16, 128, 128)
    assert default.schedule.shift == pytest.approx(2.718281828**1.15, rel=1e-6)
    assert small.schedule.shift == pytest.approx(2.718281828 ** (0.5 - 0.65 * 240 / 3840), rel=1e-6)


@pytest.mark.parametrize("size", [18, (16, 22)])
def test_images_are_whole_patches(dev, size):
    with pytest.raises(ValueError, match=r"image_size must be a multiple of 4 above 0"):
        load_model(dev, image_size=size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": 2}, "patch_size must be 1 for this package, got 2: use a transformer whose latents are packed"),
        ({"axes_dims_rope": [4, 4, 4]}, r"axes_dims_rope \[4, 4, 4\] must sum to attention_head_dim, 16"),
        ({"axes_dims_rope": 2}, "axes_dims_rope must be three even numbers for this package, got 2"),
        ({"axes_dims_rope": [5, 5, 6]}, "axes_dims_rope must be three even numbers"),
        ({"in_channels": 384}, r"lacks|of shape"),
    ],
)
def test_transformers_that_are_not_understood_are_refused(folder, values, message):
    change(folder / "transformer" / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_an_autoencoder_without_a_shift_is_refused(folder):
    change(folder / "vae" / "config.json", shift_factor=None)
    with pytest.raises(ValueError, match=r"vae/config\.json: shift_factor must be a number for this package, got None"):
        load_model(folder)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("text_encoder", ["transformers", "CLIPTextModelWithProjection"]),
        ("text_encoder_2", [None, None]),
        ("tokenizer_2", ["transformers", "CLIPTokenizer"]),
        ("scheduler", ["diffusers", "FlowMatchHeunDiscreteScheduler"]),
    ],
)
def test_parts_of_other_classes_are_refused_by_name(folder, part, value):
    change(folder / "model_index.json", **{part: value})
    with pytest.raises(ValueError, match=rf"model_index\.json: (the )?{part} |scheduler_config\.json: the {part} "):
        load_model(folder)
