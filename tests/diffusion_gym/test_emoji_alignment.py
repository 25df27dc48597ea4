"""The scorer that comes with the package, on what the embedded model draws."""

import pytest
import torch

from diffusion_gym.models import load_model
from diffusion_gym.prompts import make_prompts
from diffusion_gym.rewards import make_reward
from diffusion_gym.rewards.emoji_alignment import EmojiAlignment
from tools.emoji.samples import draw_samples

PROMPTS = ["a fox", "a frog", "a bear", "a pig", "a spider", "a lion", "a camel", "a squirrel"]


@pytest.fixture(scope="module")
def images():
    return draw_samples(load_model("emoji"), PROMPTS, list(range(100, 108)), num_steps=20)


@pytest.fixture(scope="module")
def reward():
    return make_reward("emoji_alignment")


def test_the_reward_is_the_cosine_of_the_embeddings(images, reward):
    output = reward(images, PROMPTS)
    scorer = reward._scorer
    expected = torch.nn.functional.cosine_similarity(scorer.embed_images(images), scorer.embed_texts(PROMPTS))
    torch.testing.assert_close(output.values, expected)
    assert output.values.shape == (8,)
    assert reward.range == (-1.0, 1.0)
    assert (reward.name, reward.unit) == ("emoji_alignment", "1")


def test_a_picture_fits_its_own_prompt_best(images, reward):
    own = reward(images, PROMPTS).values
    others = torch.stack([reward(images, PROMPTS[k:] + PROMPTS[:k]).values for k in range(1, 8)])
    assert (own > others.amax(0)).float().mean() >= 0.75
    assert own.mean() > others.mean() + 0.3


def test_noise_and_plain_colours_fit_nothing(images, reward):
    own = reward(images, PROMPTS).values.mean()
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert reward(noise, PROMPTS).values.mean() < own - 0.2
    assert reward(torch.full_like(images, 0.5), PROMPTS).values.mean() < own - 0.2


def test_log_probabilities_of_all_prompts_sum_to_one(images):
    animals = make_prompts("simple_animals").texts
    reward = EmojiAlignment(among=animals)
    one = images[:1].expand(len(animals), -1, -1, -1)
    values = reward(one, animals).values
    assert values.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert animals[values.argmax()] == PROMPTS[0]
    assert reward.unit == "nat"
    assert (values <= 0).all()


def test_a_prompt_that_is_not_a_choice_is_named(images):
    with pytest.raises(ValueError, match="prompt 'a frog' is not one of the 2 that the reward chooses among"):
        EmojiAlignment(among=["a fox", "a pig"])(images[:2], PROMPTS[:2])
    with pytest.raises(ValueError, match="must differ from each other"):
        EmojiAlignment(among=["a fox", "a fox"])


def test_larger_and_half_precision_images_score_nearly_the_same(images, reward):
    expected = reward(images, PROMPTS).values
    large = torch.nn.functional.interpolate(images, scale_factor=2)
    torch.testing.assert_close(reward(large, PROMPTS).values, expected, atol=0.1, rtol=0)
    half = reward(images.bfloat16(), PROMPTS).values
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=0.05, rtol=0)


def test_the_reward_is_differentiable_in_the_images_and_its_weights_are_frozen(images, reward):
    pixels = images[:2].clone().requires_grad_()
    reward(pixels, PROMPTS[:2]).values.sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in reward._scorer.parameters())
