"""CLIP's scores on a small CLIP of the real class, against transformers' own forward pass and processor."""

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from diffusion_gym.rewards.clip import ClipScore, PickScore
from tests.diffusion_gym.test_image_preparation import pillow_processor
from tests.tiny import make_tiny_clip

PROMPTS = ["a fox", "a very long prompt about a dog and a cat that wash the dishes and ride a bike", "a fox", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


def pictures(number):
    return torch.randint(0, 256, (number, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255


def published_scores(folder, images):
    """Return scale·cos as the model cards compute it: one image and one prompt at a time, from Pillow's images."""
    clip = CLIPModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = pillow_processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    scores = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        pil = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        text = tokenizer(prompt, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            output = clip(**text, pixel_values=processor(pil, return_tensors="pt").pixel_values)
        scores.append(output.logits_per_image[0, 0])
    return torch.stack(scores), clip.logit_scale.exp().detach()


def test_clip_score_is_the_cosine(folder):
    reward = ClipScore(clip=folder)
    scores, scale = published_scores(folder, pictures(4))
    values = reward(pictures(4), PROMPTS).values
    torch.testing.assert_close(values, scores / scale, atol=1e-6, rtol=0)
    assert values.std() > 0.01
    assert (reward.name, reward.unit, reward.range) == ("clip_score", "1", (-1.0, 1.0))


def test_pick_score_is_the_cosine_times_the_learned_scale(folder):
    reward = PickScore(clip=folder, processor=folder)
    scores, scale = published_scores(folder, pictures(4))
    torch.testing.assert_close(reward(pictures(4), PROMPTS).values, scores, atol=1e-5, rtol=0)
    assert scale > 10
    assert (reward.name, reward.unit, reward.range) == ("pick_score", "logit", (-100.0, 100.0))


def test_chunks_and_neighbours_change_nothing(folder):
    whole = ClipScore(clip=folder)(pictures(4), PROMPTS).values
    chunks = ClipScore(clip=folder, batch_size=3)(pictures(4), PROMPTS).values
    torch.testing.assert_close(whole, chunks, atol=1e-6, rtol=0)


def test_the_learned_scale_is_not_rounded_in_half_precision(folder):
    half = PickScore(clip=folder, processor=folder, dtype=torch.bfloat16)
    values = half(pictures(4), PROMPTS).values
    torch.testing.assert_close(values, half.cosines(pictures(4), PROMPTS) * half.scale)
    assert half.scale == pytest.approx(published_scores(folder, pictures(4))[1].item(), rel=1e-6)


def test_half_precision_comes_near(folder):
    half = ClipScore(clip=folder, dtype=torch.bfloat16)(pictures(4), PROMPTS).values
    torch.testing.assert_close(half, ClipScore(clip=folder)(pictures(4), PROMPTS).values, atol=0.02, rtol=0)
