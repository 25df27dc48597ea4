"""Single-file checkpoints become folders, of which every weight is the file's."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_gym.models import load_model
from diffusion_gym.models.convert import convert, main
from tests.diffusion_gym.models.original_names import of_clip, of_mmdit, of_unet, of_vae
from tests.tiny import (
    make_tiny_latent_consistency,
    make_tiny_stable_diffusion,
    make_tiny_stable_diffusion_3,
    make_tiny_stable_diffusion_xl,
)


def weights_of(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    return {name.removeprefix("text_model."): value for name, value in load_file(file).items()}  # or not: transformers'


def unet_file(folder, clip):
    return {
        **of_unet(weights_of(folder, "unet")),
        **of_vae(weights_of(folder, "vae")),
        **of_clip(weights_of(folder, "text_encoder"), clip),
        "alphas_cumprod": torch.ones(1000),
    }


def mmdit_file(folder):
    t5 = weights_of(folder, "text_encoder_3")
    return {
        **of_mmdit(weights_of(folder, "transformer")),
        **of_vae(weights_of(folder, "vae")),
        **of_clip(weights_of(folder, "text_encoder_2"), "text_encoders.clip_g.transformer."),
        **{f"text_encoders.t5xxl.transformer.{name}": value for name, value in t5.items()},
    }


FILES = {
    "stable-diffusion": (
        make_tiny_stable_diffusion,
        lambda folder: unet_file(folder, "cond_stage_model.transformer."),
        {"unet", "vae", "text_encoder"},
    ),
    "stable-diffusion-xl": (
        make_tiny_stable_diffusion_xl,
        lambda folder: unet_file(folder, "conditioner.embedders.0.transformer."),
        {"unet", "vae", "text_encoder"},
    ),
    "stable-diffusion-3": (
        make_tiny_stable_diffusion_3,
        mmdit_file,
        {"transformer", "vae", "text_encoder_2", "text_encoder_3"},
    ),
}


@pytest.fixture(scope="module", params=FILES)
def case(request, tmp_path_factory):
    """Return a model's folder, its single file, a folder of the same kind with other weights, and the file's parts."""
    write, original, parts = FILES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    folder = write(root / "model")
    save_file(original(folder), root / "model.safetensors")
    config = shutil.copytree(folder, root / "base")
    for file in config.rglob("*.safetensors"):
        others = {name: value + 1 for name, value in load_file(file).items()}
        save_file(others, file, metadata={"format": "pt"})
    return folder, root / "model.safetensors", config, parts


def test_the_files_weights_and_the_other_models_configurations_make_a_folder(case, tmp_path):
    folder, file, config, parts = case
    assert set(convert(file, tmp_path / "new", config=config)) == parts
    for part in {path.parent.name for path in folder.rglob("*.safetensors")}:
        expected = weights_of(folder if part in parts else config, part)
        found = weights_of(tmp_path / "new", part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    for path in config.rglob("*"):
        if path.suffix not in ("", ".safetensors"):
            assert (tmp_path / "new" / path.relative_to(config)).read_bytes() == path.read_bytes()
    load_model(tmp_path / "new").denoiser  # noqa: B018


def test_a_file_keeps_its_precision_and_may_be_a_pickle_of_tensors(tmp_path):
    folder = make_tiny_stable_diffusion(tmp_path / "model")
    weights = {name: value.half() for name, value in unet_file(folder, "cond_stage_model.transformer.").items()}
    torch.save({"state_dict": weights, "global_step": 3}, tmp_path / "model.ckpt")
    convert(tmp_path / "model.ckpt", tmp_path / "new", config=folder)
    for name, value in weights_of(tmp_path / "new", "unet").items():
        assert torch.equal(value, weights_of(folder, "unet")[name].half())
    torch.save({"state_dict": weights, "callbacks": {int: convert}}, tmp_path / "more.ckpt")
    with pytest.raises(ValueError, match=r"more\.ckpt cannot be read .* a pickle of more than tensors"):
        convert(tmp_path / "more.ckpt", tmp_path / "further", config=folder)


def test_files_that_do_not_fit_are_refused_and_nothing_is_left(case, tmp_path):
    _, file, config, _ = case
    weights = load_file(file)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    for number, name in enumerate(name for name in weights if name.endswith((".0.bias", "qkv.bias"))):
        if number % 8:
            continue
        save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "less.safetensors")
        with pytest.raises(ValueError, match=r"less\.safetensors does not hold the weights .* give the folder"):
            convert(tmp_path / "less.safetensors", tmp_path / "new", config=config)
    with pytest.raises(ValueError, match=r"cut\.safetensors cannot be read .* damaged"):
        convert(cut, tmp_path / "new", config=config)
    assert not (tmp_path / "new").exists()


def test_a_file_of_another_kind_than_the_folder_is_refused(tmp_path):
    stable_diffusion = make_tiny_stable_diffusion(tmp_path / "sd")
    save_file(unet_file(stable_diffusion, "cond_stage_model.transformer."), tmp_path / "sd.safetensors")
    for write in (make_tiny_stable_diffusion_xl, make_tiny_stable_diffusion_3, make_tiny_latent_consistency):
        config = write(tmp_path / write.__name__)
        with pytest.raises(ValueError, match="does not hold the weights of a network as"):
            convert(tmp_path / "sd.safetensors", tmp_path / "new", config=config)
    normalised = make_tiny_stable_diffusion_3(tmp_path / "sd3")
    save_file(mmdit_file(normalised), tmp_path / "sd3.safetensors")
    transformer = normalised / "transformer" / "config.json"
    transformer.write_text(json.dumps({**json.loads(transformer.read_text()), "qk_norm": None}))
    with pytest.raises(ValueError, match=r"does not hold the weights of a network .* numbers, the network"):
        convert(tmp_path / "sd3.safetensors", tmp_path / "new", config=normalised)
    index = tmp_path / "sd" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "text_encoder": ["transformers", "Evil"]}))
    with pytest.raises(ValueError, match="the text_encoder 'Evil' is not understood"):
        convert(tmp_path / "sd.safetensors", tmp_path / "new", config=tmp_path / "sd")
    with pytest.raises(ValueError, match="mixture is no model of images"):
        convert(tmp_path / "sd.safetensors", tmp_path / "new", config="mixture")
    assert not (tmp_path / "new").exists()


def test_what_would_be_read_wrongly_is_refused(tmp_path):
    folder = make_tiny_stable_diffusion(tmp_path / "sd")
    weights = unet_file(folder, "cond_stage_model.transformer.")
    save_file({**weights, "v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    with pytest.raises(
        ValueError, match=r"v\.safetensors was trained to predict v .*scheduler_config\.json says other"
    ):
        convert(tmp_path / "v.safetensors", tmp_path / "new", config=folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    convert(tmp_path / "v.safetensors", tmp_path / "new", config=folder)
    assert load_model(tmp_path / "new").prediction_type == "v_prediction"
    with pytest.raises(FileExistsError, match="new is there already"):
        convert(tmp_path / "v.safetensors", tmp_path / "new", config=folder)
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in weights.items()}, tmp_path / "q.safetensors")
    with pytest.raises(ValueError, match=r"q\.safetensors is quantised .*float8_e4m3fn"):
        convert(tmp_path / "q.safetensors", tmp_path / "other", config=folder)
    for source, kind in ((tmp_path / "nowhere.safetensors", "there is no file"), (scheduler, "must be a .safetensors")):
        with pytest.raises((FileNotFoundError, ValueError), match=kind):
            convert(source, tmp_path / "other", config=folder)


def test_the_command_says_what_it_took_from_where(tmp_path, capsys):
    folder = make_tiny_stable_diffusion(tmp_path / "sd")
    file, new = tmp_path / "model.safetensors", tmp_path / "new"
    save_file(of_unet(weights_of(folder, "unet")), file)
    main([str(file), str(new), "--config", str(folder)])
    assert capsys.readouterr().out == f"{new}: unet of {file}, all else of {folder}\n"
    with pytest.raises(SystemExit, match="2"):
        main([str(file), str(new), "--config", str(folder)])
    assert "is there already" in capsys.readouterr().err
