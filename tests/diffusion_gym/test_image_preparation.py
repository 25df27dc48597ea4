"""Images for CLIP and BLIP, against transformers' own processor on Pillow's images."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from diffusion_gym.rewards.image_preparation import CLIP_MEAN, CLIP_STD, ImagePreparation, resize

LEVEL = torch.tensor(CLIP_STD)[:, None, None] * 255


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_images(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def pillow_processor(**kwargs):
    """Return transformers' processor that needs no torchvision: a class of its own since version 5."""
    newer = hasattr(transformers, "CLIPImageProcessorPil")
    return (transformers.CLIPImageProcessorPil if newer else transformers.CLIPImageProcessor)(**kwargs)


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (300, 200), (224, 224), (111, 333), (448, 448)])
def test_it_equals_transformers_but_for_a_level_or_two_in_rare_pixels(size):
    pixels = noise(*size)
    expected = pillow_processor()(Image.fromarray(pixels), return_tensors="pt").pixel_values
    levels = ((ImagePreparation()(as_images(pixels)) - expected) * LEVEL).abs()
    assert levels.shape == (1, 3, 224, 224)
    assert levels.max() < 2.01
    assert (levels > 0.5).float().mean() < (0.001 if max(size) > 224 else 0.01)


def test_an_image_of_the_right_size_is_only_normalised():
    images = as_images(noise(224, 224))
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(ImagePreparation()(images), (images - mean) / std)


def test_resizing_without_rounding_is_pillows_of_floating_point_images():
    pixels = noise(40, 60)
    channels = [Image.fromarray(pixels[..., i].astype(np.float32)) for i in range(3)]
    expected = np.stack([np.array(one.resize((33, 22), Image.Resampling.BICUBIC)) for one in channels])
    np.testing.assert_allclose(resize(as_images(pixels) * 255, 22, 33)[0].numpy(), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "crop"), [(30, 20), ({"shortest_edge": 30}, {"height": 20, "width": 20})], ids=["old format", "new format"]
)
def test_sizes_and_moments_come_from_the_folder(tmp_path, size, crop):
    config = {"size": size, "crop_size": crop, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    loaded = ImagePreparation.load(str(tmp_path))
    assert loaded == ImagePreparation(30, (20, 20), (0.1, 0.2, 0.3), (1, 2, 3))
    pixels = noise(60, 45)
    processor = pillow_processor(**config)
    expected = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    torch.testing.assert_close(loaded(as_images(pixels)), expected, atol=2.01 / 255, rtol=0)


def test_a_crop_that_is_larger_than_the_image_is_an_error():
    with pytest.raises(ValueError, match=r"the centre crop \(50, 20\) must not be larger than the shorter side, 30"):
        ImagePreparation(30, (50, 20))
