import json
import math
import pickle
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffusion_gym.models import DiffusionModel, checked_guidance_scale, load_model
from diffusion_gym.predictions import to_x0_and_epsilon
from diffusion_gym.prompts import make_prompts
from diffusion_gym.prompts.sets import NAMED
from diffusion_gym.samplers import DDIM
from diffusion_gym.sampling import sample_latents
from diffusion_gym.transitions import draw_noise, transition
from tests.tiny import EMOJI, make_tiny_stable_diffusion

PROMPTS = ["a cat", "an ant on a pink background"]


def open_pipeline(path):
    pipeline = StableDiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def pipeline():
    return open_pipeline(EMOJI)


def sample(model, latents, *, num_steps, eta, guidance_scale, generators):
    """Ancestral sampling with nothing but the package's own functions."""
    conditioning = model.encode_prompts(PROMPTS)
    grid = model.schedule.timesteps(num_steps).float()
    for t, s in pairwise(grid):
        t, s = t.expand(len(latents)), s.expand(len(latents))
        with torch.no_grad():
            prediction = model.denoise(latents, t, conditioning, guidance_scale=guidance_scale)
        step = transition(prediction.x0, prediction.epsilon, DDIM(eta).scales(model.schedule, t, s))
        latents = step.sample(generators)
    return model.decode(latents)


@pytest.mark.parametrize(("eta", "guidance_scale"), [(0.0, 4.0), (1.0, 4.0), (0.5, 1.0)])
def test_sampling_equals_the_diffusers_pipeline(emoji, pipeline, eta, guidance_scale):
    latents = draw_noise(torch.empty(2, *emoji.latent_shape), torch.Generator().manual_seed(0))

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    expected = pipeline(
        PROMPTS,
        num_inference_steps=5,
        eta=eta,
        guidance_scale=guidance_scale,
        latents=latents,
        generator=generators(),
        output_type="pt",
    ).images
    ours = sample(emoji, latents, num_steps=5, eta=eta, guidance_scale=guidance_scale, generators=generators())
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)
    assert (ours - expected).abs().mean() < 1e-5


def test_prompt_embeddings_are_the_pipelines_and_are_computed_once(emoji, pipeline):
    positive, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=["dark"] * 2)
    conditioning = emoji.encode_prompts(PROMPTS, "dark")
    torch.testing.assert_close(conditioning["prompt_embeds"], positive, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(conditioning["negative_prompt_embeds"], negative, rtol=1e-5, atol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "_encode", None)
        again = emoji.encode_prompts(PROMPTS[::-1], "dark")
    assert torch.equal(again["prompt_embeds"], conditioning["prompt_embeds"].flip(0))
    assert torch.equal(again["negative_prompt_embeds"], conditioning["negative_prompt_embeds"])


def test_prompts_that_are_cut_off_are_named_once(emoji):
    long = "a cat " * 8 + "and a dog"
    with pytest.warns(UserWarning, match=f"^2 prompts are longer than the 16 tokens .* {long!r} is the first") as seen:
        embeds = emoji.encode_prompts(["a cat", long, long + " and a fox"])["prompt_embeds"]
    assert len(seen) == 1
    assert torch.equal(embeds[1], embeds[2])


@pytest.mark.parametrize("name", sorted(set(NAMED) - {"imagenet_animals"}))  # whose names are for larger models
def test_packaged_prompts_are_seen_whole(emoji, name):
    emoji.encode_prompts(make_prompts(name).texts)  # warnings are errors


def test_guidance_of_at_most_one_is_the_prompts_own_output_and_beyond_it_extrapolates(emoji):
    latents, t = (
        torch.randn(2, *emoji.latent_shape, generator=torch.Generator().manual_seed(0)),
        torch.full((2,), 500.0),
    )
    conditioning = emoji.encode_prompts(PROMPTS)
    swapped = {"prompt_embeds": conditioning["negative_prompt_embeds"]}
    with torch.no_grad():
        below = [emoji.denoise(latents, t, conditioning, guidance_scale=scale).epsilon for scale in (0.0, 0.5, 1.0)]
        two = emoji.denoise(latents, t, conditioning, guidance_scale=2.0).epsilon
        negative = emoji.denoise(latents, t, swapped, guidance_scale=1.0).epsilon
    assert torch.equal(below[0], below[2])
    assert torch.equal(below[1], below[2])
    torch.testing.assert_close(two, 2 * below[2] - negative, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrong", [-1, -1e-9, math.nan, math.inf, "5", None, True, 1j])
def test_guidance_scales_that_are_none_are_named(emoji, wrong):
    message = rf"guidance_scale must be a finite number of at least 0 .*got {re.escape(repr(wrong))}"
    with pytest.raises(ValueError, match=message):
        checked_guidance_scale(wrong)
    if wrong is not None:
        noise = torch.zeros(1, *emoji.latent_shape)
        with pytest.raises(ValueError, match=message):
            sample_latents(emoji, noise, emoji.encode_prompts(["a cat"]), torch.tensor([999.0]), guidance_scale=wrong)


@pytest.mark.parametrize("scale", [0, 1, 7.5, np.float32(3), np.int64(2)])
def test_numbers_are_guidance_scales(scale):
    assert checked_guidance_scale(scale) == float(scale)


def test_decoding_does_not_depend_on_the_chunks(emoji, monkeypatch):
    latents = torch.randn(5, *emoji.latent_shape, generator=torch.Generator().manual_seed(0))
    whole = emoji.decode(latents)
    monkeypatch.setattr("diffusion_gym.models.base._DECODED_PIXELS_PER_CHUNK", 2 * 64 * 64)
    seen = []
    decode = type(emoji)._decode
    monkeypatch.setattr(type(emoji), "_decode", lambda self, part: seen.append(len(part)) or decode(self, part))
    torch.testing.assert_close(emoji.decode(latents), whole, rtol=0, atol=1e-5)
    assert seen == [2, 2, 1]
    assert whole.shape == (5, 3, 64, 64)
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_encode_inverts_decode(emoji):
    images = sample(
        emoji, torch.randn(2, *emoji.latent_shape, generator=torch.Generator().manual_seed(0)),
        num_steps=4, eta=0.0, guidance_scale=4.0, generators=None,
    )  # fmt: skip
    again = emoji.decode(emoji.encode(images))
    assert (again - images).abs().mean() < 0.03


def test_path_says_where_the_model_came_from(emoji, tiny):
    assert emoji.path == EMOJI
    assert emoji.source == "emoji"
    assert tiny.source == str(tiny.path)
    assert tiny.latent_shape == (4, 8, 8)
    assert tiny.image_shape == (3, 16, 16)
    assert (emoji.default_guidance_scale, tiny.default_guidance_scale) == (4.0, 5.0)


def test_nothing_is_loaded_before_it_is_needed():
    model = load_model("emoji")
    model.encode_prompts(["a cat"])
    assert "denoiser" not in model.__dict__
    assert "_vae" not in model.__dict__


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_of_the_folder_is_used(tmp_path, prediction_type):
    model = load_model(make_tiny_stable_diffusion(tmp_path / "m", prediction_type=prediction_type))
    latents, t = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0])
    conditioning = {"prompt_embeds": model.encode_prompts(["a cat"])["prompt_embeds"]}
    with torch.no_grad():
        output = model.denoiser(latents, t, conditioning["prompt_embeds"]).sample
        prediction = model.denoise(latents, t, conditioning, guidance_scale=1.0)
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    x0, _ = to_x0_and_epsilon(output, latents, alpha=alpha, sigma=sigma, prediction_type=prediction_type)
    assert model.prediction_type == prediction_type
    torch.testing.assert_close(prediction.x0, x0)


@pytest.mark.parametrize(
    ("config", "spacing", "offset", "ends_clean"),
    [
        ({"_class_name": "PNDMScheduler", "steps_offset": 1, "skip_prk_steps": True}, "leading", 1, False),
        ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "steps_offset": 1}, "leading", 1, False),
        ({"_class_name": "DDIMScheduler"}, "leading", 1, True),  # the pipeline corrects the offset of old folders
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, "trailing", 1, True),
        ({"_class_name": "EulerDiscreteScheduler", "set_alpha_to_one": False}, "linspace", 1, True),  # not its key
        ({"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}, "trailing", 1, True),
    ],
)
def test_schedulers_numbers_are_read_whatever_its_class(tmp_path, config, spacing, offset, ends_clean):
    schedule = load_model(make_tiny_stable_diffusion(tmp_path / "m", **config)).schedule
    reference = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(schedule.alphas_cumprod, reference)
    assert (schedule.spacing, schedule.steps_offset, schedule.ends_clean) == (spacing, offset, ends_clean)


def test_zero_snr_needs_another_prediction_than_epsilon(tmp_path):
    folder = make_tiny_stable_diffusion(tmp_path / "m", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero-SNR schedule needs v_prediction"):
        load_model(folder)
    good = make_tiny_stable_diffusion(tmp_path / "v", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    model = load_model(good)
    conditioning = model.encode_prompts(["a cat"])
    latents, t = torch.randn(1, *model.latent_shape), torch.tensor([999.0])
    with torch.no_grad():
        prediction = model.denoise(latents, t, conditioning, guidance_scale=5.0)
    assert torch.isfinite(prediction.x0).all()


def test_image_size_and_precision(tiny):
    larger = load_model(tiny.path, image_size=32, dtype="bfloat16")
    assert larger.latent_shape == (4, 16, 16)
    assert next(larger.denoiser.parameters()).dtype == torch.bfloat16
    assert larger.decode(torch.randn(1, 4, 16, 16)).shape == (1, 3, 32, 32)
    assert load_model(tiny.path, image_size=np.int64(32)).latent_shape == (4, 16, 16)
    assert load_model(tiny.path, image_size=(64, 32)).image_shape == (3, 64, 32)
    for wrong in (33, (32, 33), -8, 0, (64, 128, 64), (64, 0), 32.0, "32", True):
        allowed = "multiple of 2 above 0" if wrong in (33, (32, 33)) else "whole number"
        message = rf"image_size must be a {allowed}.*got {re.escape(repr(wrong))}"
        with pytest.raises(ValueError, match=message):
            load_model(tiny.path, image_size=wrong)
    with pytest.raises(ValueError, match=r"floating-point dtype .* got 'int64'"):
        load_model(tiny.path, dtype="int64")


def test_model_survives_pickling_by_its_source(tiny):
    again = pickle.loads(pickle.dumps(load_model(tiny.path, image_size=32)))
    assert isinstance(again, DiffusionModel)
    assert (again.source, again.image_shape) == (tiny.source, (3, 32, 32))


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
        load_model("emoji", device=device)


@pytest.mark.parametrize("source", [3, None, ["emoji"]])
def test_what_is_no_model_is_named(source):
    with pytest.raises(TypeError, match=f"must be a name, .*, got {re.escape(repr(source))}"):
        load_model(source)


def test_models_that_do_not_exist_are_named_with_what_is_allowed(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"unknown model 'emojy': .*\. Did you mean 'emoji'\? Give 'emoji', 'emoji_flow', 'emoji_con",
    ):
        load_model("emojy")
    with pytest.raises(FileNotFoundError, match="no folder 'nobody/nothing' here, and the Hugging Face Hub did not"):
        load_model("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"it has no model_index\.json"):
        load_model(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AudioLDMPipeline"}))
    message = (
        "'AudioLDMPipeline' is no family of models here: supported are StableDiffusionPipeline .* and MixturePipeline"
    )
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path)
    assert "Did you mean" not in str(error.value)
