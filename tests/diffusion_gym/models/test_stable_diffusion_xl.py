"""What is Stable Diffusion XL's own: two text encoders, sizes that the UNet is told, the empty negative prompt."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from agents import DenoisingPolicy, LoRA
from diffusion_gym.models import load_model
from tests.diffusion_gym.models.test_folders import change
from tests.diffusion_gym.test_lora_files import FILE, SETS, as_if_trained
from tests.families import open_pipeline
from tests.tiny import make_tiny_stable_diffusion_xl

PROMPTS = ["a cat", "an ant on a pink background"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_tiny_stable_diffusion_xl(tmp_path_factory.mktemp("xl") / "tiny")


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.mark.parametrize("forces_zeros", [True, False, ...])
@pytest.mark.parametrize("negative", ["", "dark"])
def test_embeddings_are_the_pipelines(folder, negative, forces_zeros):
    change(folder / "model_index.json", force_zeros_for_empty_prompt=forces_zeros)
    encoded = open_pipeline(folder).encode_prompt(PROMPTS, negative_prompt=[negative] * 2 if negative else None)
    conditioning = load_model(folder).encode_prompts(PROMPTS, negative)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, expected in zip(names, encoded, strict=True):
        torch.testing.assert_close(conditioning[name], expected, rtol=1e-5, atol=1e-5)
    is_zero = not conditioning["negative_prompt_embeds"].any()
    assert is_zero == (not negative and forces_zeros is not False)


def test_an_empty_prompt_is_encoded_and_only_the_negative_one_zero(original):
    conditioning = load_model(original).encode_prompts([""])
    assert all(bool(value.any()) != key.startswith("negative_") for key, value in conditioning.items())


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet/config.json", {"addition_embed_type": ...}, "addition_embed_type must be text_time .* got None"),
        ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type must be text_time .* got 'text'"),
        ("unet/config.json", {"addition_time_embed_dim": None}, "addition_time_embed_dim must be a whole number"),
        ("unet/config.json", {"time_cond_proj_dim": 8}, "time_cond_proj_dim must be None"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean must be None"),
        ("vae/config.json", {"latents_std": [1.0] * 4}, "latents_std must be None"),
        ("model_index.json", {"force_zeros_for_empty_prompt": 1}, "force_zeros_for_empty_prompt must be true or false"),
        ("model_index.json", {"text_encoder": [None, None]}, r"text_encoder must be .* \(a refiner, .* has not\)"),
        ("text_encoder_2/config.json", {"hidden_size": 64}, "text_encoder_2/model.safetensors holds"),
        ("scheduler/scheduler_config.json", {"timestep_type": "continuous"}, "timestep_type must be discrete"),
    ],
)
def test_what_is_not_understood_is_refused(folder, file, values, message):
    change(folder / file, **values)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize("values", [{"clip_sample": True}, {"clip_sample": ...}])
def test_a_scheduler_that_would_clip_latents_is_refused(folder, values):
    change(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    change(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler", **values)
    with pytest.raises(ValueError, match=r"scheduler_config\.json: clip_sample must be False .* set it to false"):
        load_model(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cross_attention_dim": 128}, r"hidden_size is 128 \+ 32, but the UNet's cross_attention_dim 128"),
        ({"projection_class_embeddings_input_dim": 80}, r"projection_class_embeddings_input_dim is 80, but .* are 72"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(folder, values, message):
    config = {**json.loads((folder / "unet" / "config.json").read_text()), **values}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_text_encoders_that_read_prompts_of_other_lengths_are_refused(folder):
    change(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=12)
    with pytest.raises(ValueError, match="text_encoder reads 16 tokens of a prompt, text_encoder_2 12"):
        load_model(folder)


@pytest.mark.parametrize(
    "targets", [*SETS, ("conv1", "proj_in", "proj_out", "to_k"), ("to_k", "add_embedding.linear_1")]
)
def test_a_lora_file_is_whole_in_the_plain_pipeline_whatever_its_targets(original, tmp_path, targets):
    model = load_model(original)
    policy = as_if_trained(DenoisingPolicy(model, adaptation=LoRA(alpha=6, targets=targets), seed=0))
    policy.save(tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and diffusers talk about missing text-encoder layers
        pipeline.load_lora_weights(tmp_path, weight_name=FILE)
    torch.manual_seed(0)
    latents, t = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 3.0])
    conditioning = model.encode_prompts(PROMPTS)
    with torch.no_grad():
        ours, theirs, plain = (
            model.denoise(latents, t, conditioning, guidance_scale=1.0, denoiser=denoiser).epsilon
            for denoiser in (policy.denoiser, pipeline.unet, None)
        )
    assert float((ours - plain).norm() / plain.norm()) > 0.01
    assert torch.equal(ours, theirs)
    again = DenoisingPolicy.load(tmp_path, model)
    for one, other in zip(policy.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
