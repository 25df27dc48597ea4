"""LAION's predictor on a small CLIP of the real class, against the published formula in float64."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel

from diffusion_gym.rewards.aesthetic import Aesthetic
from diffusion_gym.rewards.affine_head import AffineHead
from diffusion_gym.rewards.image_preparation import ImagePreparation
from tests.tiny import make_tiny_clip

SHAPES = {0: (1024, 24), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def published_head():
    """Return weights with the names and the order of the published file; five factors of about 1 in size."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for number, (height, width) in SHAPES.items():
        weights[f"layers.{number}.weight"] = torch.randn(height, width, generator=generator) / width**0.5
        weights[f"layers.{number}.bias"] = torch.randn(height, generator=generator)
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_tiny_clip(tmp_path_factory.mktemp("clip"))
    torch.save(published_head(), folder / "head.pth")
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    reward = Aesthetic(clip=folder, head=folder / "head.pth", device="cpu")
    reward.load_all()
    assert {"network", "_prepare"} <= vars(reward).keys()
    return reward


def pictures(number):
    return torch.rand(number, 3, 48, 40, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255


def test_the_rating_is_an_affine_function_of_the_normalised_embedding(folder, reward):
    images = pictures(5)
    with torch.no_grad():
        pixels = ImagePreparation.load(str(folder))(images)
        clip = CLIPModel.from_pretrained(folder).eval()
        embeds = clip(pixel_values=pixels, input_ids=torch.tensor([[3035, 3036]])).image_embeds.double().numpy()
    x = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    for number in SHAPES:
        layer = {kind: published_head()[f"layers.{number}.{kind}"].double().numpy() for kind in ("weight", "bias")}
        x = x @ layer["weight"].T + layer["bias"]
    output = reward(images, ["a fox"] * 5)
    np.testing.assert_allclose(output.values, x[:, 0], atol=1e-5)
    assert output.values.dtype == torch.float32
    assert output.values.std() > 0.01


def test_it_reads_the_image_and_not_the_prompt(reward):
    images = pictures(2)
    assert torch.equal(reward(images, ["a", "b"]).values, reward(images, ["c", ""]).values)


def test_safetensors_give_the_same(folder, reward, tmp_path):
    save_file(published_head(), tmp_path / "head.safetensors")
    images = pictures(2)
    values = Aesthetic(clip=folder, head=tmp_path / "head.safetensors")(images, ["", ""]).values
    assert torch.equal(values, reward(images, ["", ""]).values)


def test_the_head_stays_float32_in_half_precision(folder, reward):
    half = Aesthetic(clip=folder, head=folder / "head.pth", dtype=torch.bfloat16)
    images = pictures(2)
    torch.testing.assert_close(half(images, ["", ""]).values, reward(images, ["", ""]).values, atol=0.05, rtol=0)
    assert half.network.visual_projection.weight.dtype == torch.bfloat16
    assert torch.equal(half.network.head.layers[0].weight, published_head()["layers.0.weight"])


def test_a_file_that_is_not_the_one_expected_is_refused(folder):
    found = hashlib.sha256((folder / "head.pth").read_bytes()).hexdigest()
    Aesthetic(clip=folder, head=folder / "head.pth", head_sha256=found.upper()).load()
    with pytest.raises(ValueError, match=f"its SHA-256 is {found}, expected 0000"):
        Aesthetic(clip=folder, head=folder / "head.pth", head_sha256="0000").load()


def test_a_file_with_the_published_name_must_be_the_published_one(folder):
    head = folder / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(published_head(), head)
    with pytest.raises(ValueError, match="expected 21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"):
        Aesthetic(clip=folder, head=head).load()


def test_the_published_head_has_these_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in AffineHead(768).state_dict().items()}
    assert shapes == {
        f"layers.{number}.{kind}": shape
        for number, (height, width) in {**SHAPES, 0: (1024, 768)}.items()
        for kind, shape in (("weight", (height, width)), ("bias", (height,)))
    }


def test_images_of_bytes_on_disk_get_the_same_rating(reward, tmp_path):
    images = pictures(1)
    Image.fromarray((images[0] * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "one.png"))).permute(2, 0, 1)[None]
    assert torch.equal(reward(pixels / 255, [""]).values, reward(images, [""]).values)
