"""LoRA files: what one says is what diffusers, other programs and this package do, and nothing less is loaded."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from agents import DenoisingPolicy, LoRA
from diffusion_gym.models import load_model
from diffusion_gym.models.lora import _from_diffusers

FILE = "pytorch_lora_weights.safetensors"
SETS = [
    None,
    ("to_k", "proj_in"),
    ("to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "linear_1", "linear_2", "conv_in", "conv_out", "conv"),
]


def as_if_trained(policy):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return policy


@pytest.fixture
def trained(tiny, tmp_path):
    """Return a policy as if trained, and where it is saved."""
    policy = as_if_trained(DenoisingPolicy(tiny, adaptation=LoRA(alpha=6), seed=0))
    policy.save(tmp_path)
    return policy, tmp_path


def outputs(tiny, *denoisers):
    torch.manual_seed(0)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([500.0, 3.0]), tiny.encode_prompts(["a fox", ""])["prompt_embeds"])
    with torch.no_grad():
        return [denoiser(*inputs).sample for denoiser in denoisers]


def pipeline_with(tiny, folder):
    unet = type(tiny.denoiser).from_pretrained(tiny.path, subfolder="unet")
    pipeline = StableDiffusionPipeline(None, None, None, unet, None, None, None, requires_safety_checker=False)
    pipeline.load_lora_into_unet(*pipeline.lora_state_dict(folder, weight_name=FILE), pipeline.unet)
    return pipeline


@pytest.mark.parametrize("targets", SETS)
def test_a_lora_file_is_whole_in_diffusers_whatever_its_targets(tiny, tmp_path, targets):
    policy = as_if_trained(DenoisingPolicy(tiny, adaptation=LoRA(alpha=6, targets=targets), seed=0))
    policy.save(tmp_path)
    theirs = pipeline_with(tiny, tmp_path).unet
    ours, others, plain = outputs(tiny, policy.denoiser, theirs, tiny.denoiser)
    assert float((ours - plain).norm() / plain.norm()) > 0.1
    assert torch.equal(ours, others)
    again = DenoisingPolicy.load(tmp_path, tiny)
    for one, other in zip(policy.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_programs_that_read_names_and_alphas_alone_get_the_same(tiny, tmp_path):
    """W + alpha/rank·up·down of each layer, by the name with underscores: what kohya-ss, A1111 and ComfyUI do."""
    policy = as_if_trained(DenoisingPolicy(tiny, adaptation=LoRA(alpha=16, targets=("to_k", "proj_in", "conv1"))))
    policy.save(tmp_path)
    tensors = load_file(tmp_path / FILE)
    merged = type(tiny.denoiser).from_pretrained(tiny.path, subfolder="unet")
    layers = {name.replace(".", "_"): module for name, module in merged.named_modules()}
    names = {name.partition(".")[0] for name in tensors}
    for name in names:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        weight = layers[name.removeprefix("lora_unet_")].weight
        change = float(tensors[f"{name}.alpha"]) / len(down) * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        weight.data += change
    ours, theirs, plain = outputs(tiny, policy.denoiser, merged, tiny.denoiser)
    assert float((ours - theirs).norm() / (ours - plain).norm()) < 1e-4
    assert len(tensors) == 3 * len(names)


def test_a_file_of_peft_names_is_written_where_diffusers_would_misread_the_others(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_gym.models.lora._from_diffusers", lambda layers: {"conv.in.lora_A.weight": None})
    policy = as_if_trained(DenoisingPolicy(tiny, adaptation=LoRA(alpha=6, targets=("to_k", "proj_in")), seed=0))
    policy.save(tmp_path)
    monkeypatch.undo()
    assert not any(name.endswith(".alpha") for name in load_file(tmp_path / FILE))
    state, _, metadata = StableDiffusionPipeline.lora_state_dict(tmp_path, weight_name=FILE, return_lora_metadata=True)
    pipeline = pipeline_with(tiny, tmp_path)
    pipeline.unload_lora_weights()
    pipeline.load_lora_into_unet(state, None, pipeline.unet, metadata=metadata)
    ours, theirs = outputs(tiny, policy.denoiser, pipeline.unet)
    assert torch.equal(ours, theirs)
    again = DenoisingPolicy.load(tmp_path, tiny)
    assert torch.equal(*outputs(tiny, policy.denoiser, again.denoiser))


def test_files_of_earlier_versions_are_still_read(trained, tiny):
    """They have diffusers' names: `lora.down` in attention layers."""
    policy, folder = trained
    old = {}
    for name, tensor in load_file(folder / FILE).items():
        if not name.endswith(".alpha"):
            old[name] = tensor
    peft = _from_diffusers(StableDiffusionPipeline.lora_state_dict(dict(load_file(folder / FILE)))[0])
    save_file(
        {
            "unet." + name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): tensor
            for name, tensor in peft.items()
        },
        folder / FILE,
    )
    assert len(peft) == len(old)
    assert torch.equal(*outputs(tiny, policy.denoiser, DenoisingPolicy.load(folder, tiny).denoiser))


def half(tensors):
    return dict(list(tensors.items())[: len(tensors) // 2])


def with_nan(tensors):
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    return {**tensors, name: torch.full_like(tensors[name], float("nan"))}


DAMAGES = {
    "empty": (lambda tensors: {}, "are missing"),
    "half": (half, "are missing"),
    "down only": (lambda t: {k: v for k, v in t.items() if "lora_up" not in k}, r"missing \(lora_unet_\S+lora_up"),
    "no alphas": (lambda t: {k: v for k, v in t.items() if "alpha" not in k}, r"missing \(lora_unet_\S+\.alpha"),
    "NaN": (with_nan, r"1 are NaN or infinite \(lora_unet_\S+lora_up\.weight\)"),
    "one too many": (lambda t: {**t, "lora_unet_else.alpha": torch.ones(())}, r"unexpected \(lora_unet_else\.alpha\)"),
    "another shape": (lambda t: {k: v[..., :1] if v.ndim else v for k, v in t.items()}, "of another shape"),
    "another alpha": (lambda t: {k: v * 2 if "alpha" in k else v for k, v in t.items()}, "has lora_alpha .*12"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lora_file_that_is_not_whole_is_refused_by_name(trained, tiny, damage):
    policy, folder = trained
    change, message = DAMAGES[damage]
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(folder / FILE)).items()}, folder / FILE)
    before = [parameter.clone() for parameter in policy.parameters()]
    for load in (lambda: DenoisingPolicy.load(folder, tiny), lambda: policy.load_weights(folder)):
        with pytest.raises(ValueError, match=rf"{FILE}.*{message}"):
            load()
    for one, other in zip(before, policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_cut_or_missing_lora_file_is_named(trained, tiny):
    _, folder = trained
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{FILE} is damaged or not whole"):
        DenoisingPolicy.load(folder, tiny)
    (folder / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=FILE):
        DenoisingPolicy.load(folder, tiny)


def test_a_lora_of_another_model_is_named(trained, tmp_path, emoji):
    with pytest.raises(ValueError, match=f"{FILE} holds no weights for this denoiser's LoRA layers: of .* weights"):
        DenoisingPolicy.load(trained[1], emoji)


def test_a_mixtures_lora_file_is_checked_too(tmp_path):
    mixture = load_model("mixture")
    as_if_trained(DenoisingPolicy(mixture, adaptation=LoRA(), seed=0)).save(tmp_path)
    save_file(half(load_file(tmp_path / FILE)), tmp_path / FILE)
    with pytest.raises(ValueError, match=rf"{FILE}.*3 are missing"):
        DenoisingPolicy.load(tmp_path, mixture)


def test_every_layer_of_stable_diffusions_unet_has_a_name_that_diffusers_reads(emoji):
    names = [name for name, module in emoji.denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    tensors = {}
    for name in names:
        for part in ("lora_down.weight", "lora_up.weight", "alpha"):
            tensors[f"lora_unet_{name.replace('.', '_')}.{part}"] = torch.ones(())
    read = _from_diffusers(StableDiffusionPipeline.lora_state_dict(tensors)[0])
    assert set(read) == {f"{name}.lora_{half}.weight" for name in names for half in "AB"}
