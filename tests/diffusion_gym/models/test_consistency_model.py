"""Consistency models in pixels: they draw what diffusers' pipeline draws, and f(x, ε) = x."""

from itertools import pairwise

import pytest
import torch
from diffusers import ConsistencyModelPipeline

from diffusion_gym.models import load_model
from diffusion_gym.samplers import Consistency
from diffusion_gym.transitions import transition
from tests.tiny import make_tiny_consistency_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("consistency")
    return {
        "anything": make_tiny_consistency_model(root / "unconditional"),
        "2": make_tiny_consistency_model(root / "classes", num_classes=3),
    }


@torch.no_grad()
def drawn(model, prompt, noise, num_steps, generator):
    conditioning = model.encode_prompts([prompt] * len(noise))
    x = model.schedule.initial_std * noise
    times = model.schedule.timesteps(num_steps).float()
    for pair in pairwise(times):
        t, s = (time.expand(len(x)) for time in pair)
        prediction = model.denoise(x, t, conditioning, guidance_scale=1.0)
        x = transition(prediction.x0, prediction.epsilon, Consistency().scales(model.schedule, t, s)).sample(generator)
    return model.decode(x)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("prompt", ["anything", "2"])
def test_samples_are_those_of_the_pipeline(folders, prompt, num_steps):
    pipeline = ConsistencyModelPipeline.from_pretrained(folders[prompt])
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline(
        batch_size=2,
        latents=noise,
        class_labels=None if prompt == "anything" else [int(prompt)] * 2,
        num_inference_steps=num_steps,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    images = drawn(load_model(folders[prompt]), prompt, noise, num_steps, torch.Generator().manual_seed(1))
    assert images.std() > 0.01
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_the_boundary_is_exact(folders):
    model = load_model(folders["anything"])
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    t = torch.full((4,), model.boundary_time)
    with torch.no_grad():
        prediction = model.denoise(x, t, model.encode_prompts(["anything"] * 4), guidance_scale=1.0)
    assert torch.equal(prediction.x0, x)
    assert bool((prediction.epsilon == 0).all())


def test_classes_differ_and_unknown_ones_are_named(folders):
    model = load_model(folders["2"])
    x, t = torch.randn(2, 3, 8, 8), torch.full((2,), 5.0)
    x = x[:1].expand(2, -1, -1, -1)
    with torch.no_grad():
        x0 = model.denoise(x, t, model.encode_prompts(["0", "1"]), guidance_scale=1.0).x0
    assert (x0[0] - x0[1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="unknown class 'cat'"):
        model.encode_prompts(["cat"])


def test_features_have_the_shapes_that_the_model_says(folders):
    model = load_model(folders["2"])
    with torch.no_grad():
        prediction = model.denoise(
            torch.randn(2, 3, 8, 8), torch.full((2,), 1.0), model.encode_prompts(["0", "1"]),
            guidance_scale=1.0, with_features=True,
        )  # fmt: skip
    assert prediction.features.shape == (2, *model.feature_shape)
    assert prediction.time_embedding.shape == (2, model.time_embedding_size)


def test_pictures_are_latents_and_back(folders):
    model, images = load_model(folders["anything"]), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(model.decode(model.encode(images)), images)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"s_noise": 0.5}, "s_noise must be"), ({"sigma_min": 90.0}, "sigma_min must be below sigma_max")],
)
def test_what_is_not_understood_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_model(make_tiny_consistency_model(tmp_path / "model", **config))


def test_image_size_must_suit_the_network(folders):
    assert load_model(folders["anything"], image_size=12).image_size == (12, 12)
    with pytest.raises(ValueError, match="multiple of 2"):
        load_model(folders["anything"], image_size=11)
