"""What a model's folder says is understood, or refused, or warned about: when it is loaded, by name."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import diffusion_gym  # noqa: F401
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import write_mixture
from tests.tiny import make_tiny_stable_diffusion

UNET, VAE, TEXT = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    return make_tiny_stable_diffusion(tmp_path_factory.mktemp("folders") / "tiny")


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


def change(file: Path, **values):
    """Change keys of a configuration; ... drops one."""
    config = {key: value for key, value in {**json.loads(file.read_text()), **values}.items() if value is not ...}
    file.write_text(json.dumps(config))


def to_half(folder: Path, *names: str):
    for name in names:
        weights = {key: value.half() for key, value in load_file(folder / f"{name}.safetensors").items()}
        save_file(weights, folder / f"{name}.fp16.safetensors", {"format": "pt"})
        (folder / f"{name}.safetensors").unlink()


def test_no_code_of_a_folder_runs_and_no_name_of_it_is_looked_up(folder, tmp_path):
    (folder / "scheduler" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: ...\n")
    (folder / "scheduler" / "model_index.json").write_text(json.dumps({"_class_name": ["evil", "Evil"]}))
    for name in ("DiffusionPipeline", "utils", "AutoencoderKL", "LCMScheduler", ["evil", "Evil"], None, 3):
        change(folder / "model_index.json", scheduler=["diffusers", name])
        with pytest.raises(ValueError, match=r"model_index\.json.*scheduler|scheduler_config\.json.*not understood"):
            load_model(folder)
    assert not (tmp_path / "ran").exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("unet", ["evil", "UNet2DConditionModel"]),
        ("unet", ["diffusers", "UNet2DModel"]),
        ("vae", ["diffusers", "AutoencoderTiny"]),
        ("text_encoder", ["transformers", "CLIPTextModelWithProjection"]),
        ("tokenizer", ["transformers", "T5Tokenizer"]),
        ("text_encoder", [None, None]),
        ("vae", ...),
    ],
)
def test_parts_of_other_classes_are_refused_by_name(folder, part, value):
    change(folder / "model_index.json", **{part: value})
    with pytest.raises(ValueError, match=rf"model_index\.json: (the )?{part} "):
        load_model(folder)


@pytest.mark.parametrize("class_name", [..., ["a", "b"], None, "StableDiffusionXLImg2ImgPipeline", "AuraFlowPipeline"])
def test_other_families_are_told_which_are_supported(folder, class_name):
    change(folder / "model_index.json", _class_name=class_name)
    with pytest.raises(ValueError, match=r"is no family of models here: supported are .* 1\.x, 2\.x\)") as error:
        load_model(folder)
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction_type must be one of .* got 'flow_prediction'"),
        ({"prediction_type": "flow"}, "prediction_type must be one of .* got 'flow'"),
        ({"prediction_type": None}, "prediction_type must be one of .* got None"),
        ({"thresholding": True}, "thresholding must be False .* got True"),
        ({"timestep_spacing": "karras"}, "timestep_spacing must be one of .* got 'karras'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule must be one of"),
        ({"beta_start": "0.1"}, "beta_start must be a number between 0 and 1"),
        ({"steps_offset": "1"}, "steps_offset must be a whole number"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one must be one of"),
        ({"clip_sample": 1}, "clip_sample must be one of"),
        ({"num_train_timesteps": 1}, "num_train_timesteps must be a whole number of at least 2"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas holds 2 numbers, num_train_timesteps is 1000"),
        ({"trained_betas": [0.1] * 999 + [2.0]}, "alphas_cumprod must be a strictly decreasing"),
    ],
)
def test_noise_processes_that_are_not_understood_are_refused(folder, values, message):
    change(folder / "scheduler" / "scheduler_config.json", **values)
    with pytest.raises(ValueError, match=rf"scheduler_config\.json:? .*{message}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("class_name", "values"),
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": {}}),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
        ("EulerDiscreteScheduler", {"sigma_max": 10.0}),
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"timestep_spacing": "leading"}),
        ("DEISMultistepScheduler", {}),
        ("DPMSolverSinglestepScheduler", {}),
        ("DDIMScheduler", {"beta_stat": 0.1}),
    ],
)
def test_what_the_folders_own_sampler_would_do_otherwise_is_warned_about(folder, class_name, values):
    change(folder / "model_index.json", scheduler=["diffusers", class_name])
    change(folder / "scheduler" / "scheduler_config.json", _class_name=class_name, **values)
    with pytest.warns(
        UserWarning, match=rf"scheduler_config\.json: .*({class_name} visits|{next(iter(values), class_name)})"
    ) as seen:
        load_model(folder)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "class_name", ["LCMScheduler", "TCDScheduler", "FlowMatchEulerDiscreteScheduler", "RePaintScheduler"]
)
def test_schedulers_of_distilled_or_other_models_are_refused(folder, class_name):
    change(folder / "model_index.json", scheduler=["diffusers", class_name])
    with pytest.raises(
        ValueError, match=f"the scheduler '{class_name}' is not understood: allowed are .*DDIMScheduler"
    ):
        load_model(folder)


def test_a_scheduler_that_two_files_name_differently_is_warned_about(folder):
    change(folder / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler")
    with pytest.warns(
        UserWarning, match="_class_name is 'LCMScheduler', model_index.json beside it says 'DDIMScheduler'"
    ):
        load_model(folder)


def test_euler_ends_at_the_clean_end_whatever_set_alpha_to_one_says(folder):  # as published for SD 2 and SD-Turbo
    change(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    values = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "set_alpha_to_one": False}
    change(folder / "scheduler" / "scheduler_config.json", **values)
    scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # diffusers' own, of NumPy
        scheduler.set_timesteps(4)
    assert load_model(folder).schedule.timesteps(4).tolist() == [*scheduler.timesteps.tolist(), -1.0]
    assert scheduler.sigmas[-1] == 0


def test_old_folders_are_corrected_as_the_pipeline_corrects_them(folder):
    change(folder / "scheduler" / "scheduler_config.json", steps_offset=0, clip_sample=True)
    change(folder / "unet" / "config.json", _diffusers_version="0.8.1")
    with pytest.warns(FutureWarning):
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler.set_timesteps(4)
    model = load_model(folder)
    assert model.schedule.timesteps(4).tolist()[:-1] == pipeline.scheduler.timesteps.tolist()
    assert model.latent_shape[1] == pipeline.unet.config.sample_size == 64


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet", {"time_cond_proj_dim": 8}, "time_cond_proj_dim must be None"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type must be None"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type must be None"),
        ("unet", {"sample_size": [8, 16, 8]}, r"sample_size must be .* got \[8, 16, 8\]: give .* image_size"),
        ("unet", {"sample_size": None}, "sample_size must be .* got None: give .* image_size"),
        ("unet", {"sample_size": ...}, "sample_size must be .* got None: give .* image_size"),
        ("unet", {"freq_shift": "1"}, "freq_shift must be .*int.*, got .1."),
        ("unet", {"norm_eps": None}, "norm_eps must be .*float.*, got None"),
        ("unet", {"act_fn": 3}, "does not describe a network that can be built"),
        ("unet", {"block_out_channels": "nonsense"}, "does not describe a network that can be built"),
        ("vae", {"scaling_factor": 0}, "scaling_factor must be a number above 0"),
        ("vae", {"scaling_factor": "1"}, "scaling_factor must be a number above 0"),
        ("vae", {"in_channels": 4}, "in_channels must be 3"),
        ("text_encoder", {"hidden_act": "nonsense"}, "does not describe a network that can be built"),
    ],
)
def test_networks_that_are_not_understood_are_refused(folder, file, values, message):
    change(folder / file / "config.json", **values)
    with pytest.raises(ValueError, match=rf"{file}/config\.json.*{message}"):
        load_model(folder)


@pytest.mark.parametrize(("size", "shape"), [([8, 8], (4, 8, 8)), (8, (4, 8, 8)), ([8, 16], (4, 8, 16))])
def test_sample_sizes_are_understood(folder, size, shape):
    change(folder / "unet" / "config.json", sample_size=size)
    assert load_model(folder).latent_shape == shape


@pytest.mark.parametrize("size", [[8, 16], None, "8"])
def test_a_given_image_size_is_enough(folder, size):
    change(folder / "unet" / "config.json", sample_size=size)
    assert load_model(folder, image_size=16).latent_shape == (4, 8, 8)


def rewrite(folder: Path, part: str, **values):
    """Write a network anew with other numbers."""
    import diffusers

    network = getattr(diffusers, {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[part])
    config = {**json.loads((folder / part / "config.json").read_text()), **values}
    network.from_config(config).save_pretrained(folder / part)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("unet", {"in_channels": 9}, "in_channels is 9, .* latents have 4 .*: not a text-to-image denoiser"),
        ("unet", {"out_channels": 8}, "out_channels is 8, the autoencoder's latents have 4"),
        ("vae", {"latent_channels": 16}, "in_channels is 4, the autoencoder's latents have 16"),
        ("unet", {"cross_attention_dim": 64}, "hidden_size is 128, but the UNet's cross_attention_dim 64"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(folder, part, values, message):
    rewrite(folder, part, **values)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize("name", [UNET, VAE, TEXT])
def test_weights_are_looked_at_when_a_model_is_loaded(folder, name):
    file = folder / f"{name}.safetensors"
    whole = {key: value.clone() for key, value in load_file(file).items()}  # the file is about to be overwritten
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{name}\.safetensors cannot be read: it is cut off"):
        load_model(folder)
    key = sorted(whole)[0]
    save_file({k: v for k, v in whole.items() if k != key}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}\.safetensors lacks {key.removeprefix('text_model.')}"):
        load_model(folder)
    save_file({**whole, key: whole[key][:1].clone().repeat(7, *[1] * (whole[key].ndim - 1))}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}\.safetensors holds .* of shape \[7"):
        load_model(folder)
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=rf"{name}\.safetensors cannot be read"):
        load_model(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file.parent} has no {file.name} \(or \.bin\)$"):
        load_model(folder)


@pytest.mark.parametrize("name", [UNET, VAE, TEXT])
def test_pickled_weights_are_read_too_and_looked_at(folder, name):
    file = folder / f"{name}.safetensors"
    before = load_file(file)
    other = file.with_name(f"{'pytorch_model' if name == TEXT else file.stem}.bin")
    torch.save(before, other)
    file.unlink()
    model = load_model(folder)
    images = model.decode(torch.ones(1, *model.latent_shape))
    assert images.shape == (1, *model.image_shape)
    assert model.encode_prompts(["a cat"])["prompt_embeds"].shape[0] == 1
    assert sum(1 for _ in model.denoiser.parameters()) > 0
    other.write_bytes(other.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"{other.name} cannot be read: it is cut off"):
        load_model(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "model_index.json"])
def test_a_missing_configuration_is_named(folder, part):
    file = next((folder / part).glob("*config.json"), folder / part)
    file.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"{file.parent} (has|is not a diffusers folder: it has) no {file.name}"
    ):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_configurations_that_are_no_json_objects_are_named(folder, text):
    for name in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "text_encoder/config.json"):
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name} (is not JSON|must hold a JSON object)"):
            load_model(folder)
        (folder / name).write_text(before)


def test_sharded_weights_are_looked_at(folder):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    (folder / f"{UNET}.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    shards = sorted((folder / "unet").glob("*-of-*"))
    assert len(shards) > 1
    loaded = load_model(folder).denoiser.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in unet.state_dict().items())
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {shards[-1].name}, which .*index.json names"):
        load_model(folder)


def test_half_precision_files_are_offered_and_read(folder, original):
    to_half(folder, UNET, VAE, TEXT)
    with pytest.raises(FileNotFoundError, match=r'unet has no .* load_model\(…, variant="fp16"\) takes .*fp16'):
        load_model(folder)
    with pytest.raises(FileNotFoundError, match=r'variant="fp16"'):
        gym.make("DenoisingMDP-v0", model=folder)
    half, plain = load_model(folder, variant="fp16"), load_model(original)
    for name, tensor in plain.denoiser.state_dict().items():
        torch.testing.assert_close(half.denoiser.state_dict()[name], tensor.half().float(), rtol=0, atol=0)
    for key, value in plain.encode_prompts(["a cat"]).items():
        torch.testing.assert_close(half.encode_prompts(["a cat"])[key], value, rtol=1e-2, atol=1e-2)
    env = gym.make("DenoisingMDP-v0", model=folder, variant="fp16", num_steps=2)
    env.reset(seed=0)
    assert env.unwrapped.model.variant == "fp16"


def test_a_variant_falls_back_to_plain_files_where_a_network_has_none(folder):
    to_half(folder, UNET)
    model = load_model(folder, variant="fp16")
    model.encode_prompts(["a cat"])
    model.decode(torch.zeros(1, *model.latent_shape))
    assert next(model.denoiser.parameters()).dtype == torch.float32


@pytest.mark.parametrize("wrong", ["", 16, True])
def test_variants_that_are_no_names_are_refused(folder, wrong):
    with pytest.raises(ValueError, match="variant must be None or a name"):
        load_model(folder, variant=wrong)


def test_a_loaded_model_of_another_variant_is_named(folder):
    with pytest.raises(ValueError, match="variant=fp16 differs from the loaded model's None"):
        gym.make("DenoisingMDP-v0", model=load_model(folder), variant="fp16")


@pytest.mark.parametrize(("length", "tokens"), [(..., 16), (None, 16), (1e30, 16), (10**30, 16), (77, 16), (8, 8)])
def test_a_prompt_has_at_most_as_many_tokens_as_the_text_encoder_takes(folder, length, tokens):
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    embeds = load_model(folder).encode_prompts(["a cat"])["prompt_embeds"]
    assert embeds.shape == (1, tokens, 128)


@pytest.mark.parametrize("length", [0, -1, 2, "77", [77]])
def test_absurd_lengths_are_named(folder, length):
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(ValueError, match=r"tokenizer(_config\.json: model_max_length must be| holds no tokenizer)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("key", "wrong", "words"),
    [("model_type", ["a"], "a text"), ("model_type", {}, "a text"), ("eos_token_id", [], "a whole number"),
     ("eos_token_id", None, "a whole number")],
)  # fmt: skip
def test_text_encoders_that_would_fail_late_are_refused(folder, key, wrong, words):
    change(folder / "text_encoder" / "config.json", **{key: wrong})
    with pytest.raises(
        ValueError, match=rf"text_encoder/config\.json: {key} must be {words}, got {re.escape(str(wrong))}"
    ):
        load_model(folder)


def test_tokenizers_without_a_vocabulary_are_named(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    load_model(folder).encode_prompts(["a cat"])
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer has no vocabulary: neither"):
        load_model(folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(FileNotFoundError, match="tokenizer has no vocabulary: neither"):
        load_model(folder)


def test_a_tokenizer_of_another_text_encoder_is_named(folder):
    file = folder / f"{TEXT}.safetensors"
    weights = {key: value.clone() for key, value in load_file(file).items()}
    name = next(key for key in weights if "token_embedding" in key)
    save_file({**weights, name: weights[name][:100].clone()}, file, {"format": "pt"})
    change(folder / "text_encoder" / "config.json", vocab_size=100, eos_token_id=99, bos_token_id=98, pad_token_id=0)
    with pytest.raises(ValueError, match=r"tokenizer knows 3037 tokens, the text encoder 100 \(vocab_size\)"):
        load_model(folder)


def test_single_files_are_told_how_to_become_folders(tmp_path):
    (tmp_path / "model.safetensors").touch()
    for source in (tmp_path / "model.safetensors", "nowhere/model.ckpt"):
        with pytest.raises(FileNotFoundError, match=r"is a single file, .* `python -m diffusion_gym.models.convert '"):
            load_model(source)
    for name, pipeline in (
        ("conditioner.embedders.1.model.ln_final.bias", "StableDiffusionXLPipeline"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.bias", "StableDiffusion3Pipeline"),
        ("double_blocks.0.img_attn.qkv.bias", "FluxPipeline"),
    ):
        save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(FileNotFoundError, match=f"is a single file, as of a {pipeline},"):
            load_model(tmp_path / "model.safetensors")


def test_mixtures_are_looked_at_too(tmp_path):
    folder = write_mixture(tmp_path / "mixture", [[0.0], [1.0]], stds=[1.0, 1.0], names=["left", "right"])
    load_model(folder)
    for names in (..., ["left"], ["left", 3], "lr"):
        change(folder / "model_index.json", names=names)
        with pytest.raises(ValueError, match=r"model_index\.json: names must be 2 texts"):
            load_model(folder)
    change(folder / "model_index.json", names=["left", "right"])
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(ValueError, match="a mixture predicts epsilon, got 'sample'"):
        load_model(folder)
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    for values in ({"means": ...}, {"means": [[0.0], [1.0, 2.0]]}, {"stds": [1.0]}, {"stds": "ab"}, {"stds": [1, 0]}):
        before = (folder / "denoiser" / "config.json").read_text()
        change(folder / "denoiser" / "config.json", **values)
        with pytest.raises(ValueError, match=r"denoiser/config\.json does not describe a network"):
            load_model(folder)
        (folder / "denoiser" / "config.json").write_text(before)
    (folder / "denoiser" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"denoiser has no diffusion_pytorch_model\.safetensors"):
        load_model(folder)
