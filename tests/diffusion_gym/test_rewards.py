import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_gym.rewards import (
    Cached,
    CallableReward,
    Normalised,
    Reward,
    RewardOutput,
    Threshold,
    Timed,
    WeightedSum,
    make_reward,
    to_uint8,
)
from diffusion_gym.rewards.jpeg import jpeg_kilobytes


def pictures(num, size=64, seed=0):
    """Smooth to noisy images."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(num, 3, size, size, generator=generator)
    flat = torch.rand(num, 3, 1, 1, generator=generator)
    weight = torch.linspace(0, 1, num).reshape(-1, 1, 1, 1)
    return (weight * noise + (1 - weight) * flat).clamp(0, 1)


def ddpo_pytorch_jpeg_kilobytes(images):
    """The published function, image by image (its `jpeg_incompressibility`)."""
    array = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy().transpose(0, 2, 3, 1)
    sizes = []
    for pixels in array:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return np.array(sizes)


@pytest.mark.parametrize("size", [64, 100])
def test_jpeg_rewards_are_ddpo_pytorchs_byte_for_byte(size):
    images = pictures(16, size)
    expected = ddpo_pytorch_jpeg_kilobytes(images)
    values = make_reward("incompressibility")(images, [""] * 16).values
    assert (values.double() * 1000).round().int().tolist() == (expected * 1000).round().astype(int).tolist()
    assert values.dtype == torch.float32
    assert torch.equal(make_reward("compressibility")(images, [""] * 16).values, -values)
    assert values[-1] > 2 * values[0]


def test_quality_is_a_parameter():
    images = pictures(4)
    assert (jpeg_kilobytes(images, quality=20) < jpeg_kilobytes(images)).all()


def test_bytes_are_rounded_to_the_nearest_level():
    levels = torch.tensor([0.0, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.0, 1.2, -0.1])
    image = levels.reshape(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_uint8(image)[0, 0, :, 0].tolist() == [0, 0, 1, 255, 255, 255, 0]


def test_brightness_is_the_mean_and_keeps_the_gradient():
    images = pictures(3).requires_grad_()
    values = make_reward("brightness")(images, [""] * 3).values
    torch.testing.assert_close(values, images.mean((1, 2, 3)))
    values.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / images[0].numel()))


def test_callables_and_sums():
    def red(images, prompts, metadata):
        return images[:, 0].mean((1, 2))

    images = pictures(3)
    output = make_reward(red)(images, ["a"] * 3)
    assert make_reward(red).name == "red"
    torch.testing.assert_close(output.values, images[:, 0].mean((1, 2)))
    both = make_reward({"brightness": -2.0, "compressibility": 1})
    output = both(images, ["a"] * 3)
    torch.testing.assert_close(output.values, -2 * images.mean((1, 2, 3)) - jpeg_kilobytes(images))
    assert set(output.extras) == {"brightness", "compressibility"}
    assert both.range == (-float("inf"), 0.0)
    assert both.unit == "mixed"


def test_rewards_of_one_name_are_told_apart_before_they_are_added():
    def judge(images, prompts, metadata):
        return images.mean((1, 2, 3))

    with pytest.raises(ValueError, match=r"must differ, got \['judge', 'judge'\]: give one of them another"):
        WeightedSum([(make_reward(judge), 1.0), (make_reward(judge), 2.0)])
    both = WeightedSum([(make_reward(judge), 1.0), (CallableReward(judge, name="other"), 2.0)])
    assert set(both(pictures(2), ["a"] * 2).extras) == {"judge", "other"}


@pytest.mark.parametrize(
    "weighted",
    [{"brightness": 2, "compressibility": np.float32(0.5)},
     [("brightness", 2.0), ("compressibility", 0.5)],
     [(lambda images, prompts, metadata: images.mean((1, 2, 3)), 2.0), (make_reward("compressibility"), 0.5)]],
)  # fmt: skip
def test_sums_take_what_makes_a_reward(weighted):
    images = pictures(3)
    expected = 2 * images.mean((1, 2, 3)) - 0.5 * jpeg_kilobytes(images)
    torch.testing.assert_close(WeightedSum(weighted)(images, ["a"] * 3).values, expected)


@pytest.mark.parametrize("weight", ["a", "1", None, float("nan"), float("inf"), [1.0]])
def test_weights_that_are_no_numbers_are_named(weight):
    for make in (make_reward, WeightedSum, lambda weighted: WeightedSum(list(weighted.items()))):
        with pytest.raises(ValueError, match="weight of the reward 'brightness' must be a finite number, got "):
            make({"brightness": weight})
        with pytest.raises(ValueError, match="at least one"):
            make({})


class Judge(Reward):
    name = "judge"

    def __init__(self, output):
        self.output = output

    def __call__(self, images, prompts, metadata=None):
        return self.output


NO_VALUES = [None, ["a", "b"], "ab", 1j * torch.ones(2), np.ones(2) * 1j, (torch.ones(2), {}), torch.ones(2, 1), 0.5]


@pytest.mark.parametrize("wrong", NO_VALUES, ids=str)
def test_a_function_that_returns_no_values_is_named(wrong):
    reward = CallableReward(lambda images, prompts, metadata: wrong, name="judge")
    with pytest.raises(ValueError, match=r"'judge' returns must be one value per image, \[2\] real numbers, got "):
        reward(pictures(2), ["a"] * 2)


@pytest.mark.parametrize("wrong", [*NO_VALUES, [1.0, 2.0]], ids=str)
@pytest.mark.parametrize(
    "wrap",
    [Normalised, Timed, Cached, lambda reward: Threshold(reward, 0.5), lambda reward: WeightedSum([(reward, 1)])],
)
def test_a_reward_that_returns_no_output_is_named_in_compositions_too(wrap, wrong):
    right = torch.ones(2)
    for output in (right, wrong, RewardOutput(wrong), RewardOutput(right, {"extra": wrong})):
        with pytest.raises(ValueError, match=r"the reward 'judge' must (return a RewardOutput|be one value per image)"):
            wrap(Judge(output))(pictures(2), ["a"] * 2)


def test_every_named_reward_states_unit_and_range_and_keeps_to_it():
    for name in ("incompressibility", "compressibility", "brightness", "emoji_alignment"):
        reward = make_reward(name)
        values = reward(pictures(8), [""] * 8).values
        assert reward.name == name
        assert reward.unit in ("kB", "1")
        assert (values >= reward.range[0]).all()
        assert (values <= reward.range[1]).all()
        assert values.shape == (8,)


def test_unknown_rewards_are_named():
    with pytest.raises(ValueError, match=r"unknown reward 'brigthness': .* Did you mean 'brightness'\?"):
        make_reward("brigthness")
    with pytest.raises(ValueError, match="unknown reward 'x'"):
        make_reward({"brightness": 1, "x": 2})
