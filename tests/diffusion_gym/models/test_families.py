"""What holds for every family of models, on small random folders of its real classes."""

import pickle
import shutil
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import diffusion_gym  # noqa: F401
from diffusion_gym.models import load_model
from diffusion_gym.testing import check_vector_env
from diffusion_gym.transitions import draw_noise
from tests.families import FAMILIES, open_pipeline

PROMPTS = ["a cat", "an ant on a pink background"]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return family.write(tmp_path_factory.mktemp(family.name) / "model")


@pytest.fixture(scope="module")
def pipeline(folder):
    return open_pipeline(folder)


@pytest.fixture(scope="module")
def model(family, folder):
    return load_model(folder, image_size=family.told_size)


@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize("size", range(3))
def test_samples_are_those_of_the_pipeline(family, folder, pipeline, size, num_steps):
    image_size = family.image_sizes[size]
    model = load_model(folder, image_size=family.told_size if size == 0 else image_size)
    assert model.image_size == image_size
    noise = draw_noise(torch.empty(2, *model.latent_shape), torch.Generator().manual_seed(0))
    images = family.sample(model, PROMPTS, noise, num_steps=num_steps)
    expected = family.draw(folder, PROMPTS, noise, num_steps=num_steps, pipeline=pipeline, image_size=image_size)
    assert images.std() > 0.01
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_every_shape_that_a_model_says_is_so(model):
    conditioning = model.encode_prompts(PROMPTS)
    latents, t = torch.randn(2, *model.latent_shape), torch.full((2,), model.schedule.start_time)
    with torch.no_grad():
        prediction = model.denoise(latents, t, conditioning, guidance_scale=2.0, with_features=True)
        plain = model.denoise(latents, t, conditioning, guidance_scale=2.0)
    assert prediction.x0.shape == prediction.epsilon.shape == latents.shape
    assert prediction.features.shape == (2, *model.feature_shape)
    assert prediction.time_embedding.shape == (2, model.time_embedding_size)
    assert model.feature_shape[1] <= 16
    assert model.feature_shape[2] <= 16
    torch.testing.assert_close(prediction.x0, plain.x0)
    images = model.decode(latents)
    assert images.shape == (2, *model.image_shape)
    assert model.encode(images).shape == latents.shape


def test_features_tell_prompts_times_and_pictures_apart(model):
    conditioning = model.encode_prompts(PROMPTS)
    noise = torch.randn(1, *model.latent_shape).expand(2, *model.latent_shape)
    start = model.schedule.start_time
    with torch.no_grad():
        told = model.denoise(noise, torch.full((2,), start), conditioning, guidance_scale=2.0, with_features=True)
        times = model.denoise(
            noise, torch.tensor([start, start / 2]), model.encode_prompts(PROMPTS[:1] * 2), guidance_scale=2.0,
            with_features=True,
        )  # fmt: skip
    assert (told.features[0] - told.features[1]).abs().max() > 1e-4
    assert (times.time_embedding[0] - times.time_embedding[1]).abs().max() > 1e-4


def test_a_batch_may_stand_at_many_times(model, family):
    conditioning = model.encode_prompts(PROMPTS)
    latents, t = torch.randn(2, *model.latent_shape), model.schedule.timesteps(4)[:2].float()
    with torch.no_grad():
        both = model.denoise(latents, t, conditioning, guidance_scale=family.guidance_scale)
        for row in range(2):
            one = {key: value[row : row + 1] for key, value in conditioning.items()}
            alone = model.denoise(latents[row : row + 1], t[row : row + 1], one, guidance_scale=family.guidance_scale)
            torch.testing.assert_close(both.x0[row], alone.x0[0], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*A Box (observation|action) space")
@pytest.mark.parametrize(
    ("env_id", "length"), [("DenoisingMDP-v0", "num_steps"), ("TimePredictionMDP-v0", "max_steps")]
)
def test_both_environments_keep_their_contracts(model, env_id, length):
    arguments = {"model": model, "reward": "brightness", length: 3}
    check_env(gym.make(env_id, **arguments).unwrapped, skip_render_check=True)
    check_vector_env(gym.make_vec(env_id, num_envs=2, **arguments))


def test_a_pickle_is_the_same_model(model, family):
    again = pickle.loads(pickle.dumps(model))
    assert (again.image_shape, again.latent_shape, again.feature_shape) == (
        model.image_shape,
        model.latent_shape,
        model.feature_shape,
    )
    latents, t = torch.randn(1, *model.latent_shape), torch.full((1,), model.schedule.start_time)
    with torch.no_grad():
        first, second = (
            one.denoise(latents, t, one.encode_prompts(PROMPTS[:1]), guidance_scale=family.guidance_scale).x0
            for one in (model, again)
        )
    assert torch.equal(first, second)


def test_weights_in_half_precision_are_the_rounded_ones_and_predict_nearly_the_same(model, folder, family):
    half = load_model(folder, dtype="bfloat16", image_size=family.told_size)
    rounded = {name: value.bfloat16() for name, value in model.denoiser.state_dict().items()}
    assert all(torch.equal(value, rounded[name]) for name, value in half.denoiser.state_dict().items())
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t, scale = torch.full((2,), model.schedule.start_time * 0.7), family.guidance_scale
    with torch.no_grad():
        exact, near = (
            one.denoise(latents, t, model.encode_prompts(PROMPTS), guidance_scale=scale, with_features=True)
            for one in (model, half)
        )
    error = (near.epsilon - exact.epsilon).square().mean() / exact.epsilon.square().mean()
    assert near.epsilon.dtype == near.features.dtype == torch.float32
    assert 0 < float(error.sqrt()) < 0.1


def test_missing_weights_are_said_when_the_model_is_loaded(folder, tmp_path):
    for number, file in enumerate(sorted(folder.rglob("*.safetensors"))):
        copy = Path(shutil.copytree(folder, tmp_path / str(number)))
        lost = copy / file.relative_to(folder)
        lost.unlink()
        with pytest.raises(FileNotFoundError, match=str(lost.parent)):
            load_model(copy)
