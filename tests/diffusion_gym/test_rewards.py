import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffusion_gym.rewards import (
    Cached,
    CallableReward,
    Normalised,
    Retry,
    Reward,
    RewardOutput,
    Threshold,
    Timed,
    WeightedSum,
    make_reward,
    to_uint8,
)
from diffusion_gym.rewards.base import checked_output
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


class Nameless(Reward):
    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(images.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, r"the reward Made must have a name, .* got None: name = \"made\" in the class"),
        ({"name": ""}, "must have a name"),
        ({"name": 3}, "must have a name, a text that is not empty, got 3"),
        ({"name": "x", "unit": None}, "must have a unit"),
        ({"name": "x", "range": (1, 0)}, r"the range of the reward 'x' must be \(least, greatest\), got \(1, 0\)"),
        ({"name": "x", "range": None}, "range of the reward 'x'"),
        ({"name": "x", "range": (0, float("nan"))}, "range of the reward 'x'"),
    ],
)
def test_a_reward_that_does_not_say_what_it_is_is_named_when_it_is_made(attributes, message):
    made = type("Made", (Nameless,), attributes)()
    for make in (make_reward, at_least_0, Normalised, Cached, Timed, lambda reward: WeightedSum([(reward, 1.0)])):
        with pytest.raises(TypeError, match=message):
            make(made)


def at_least_0(reward):
    return Threshold(reward, 0.0)


def test_functions_that_do_not_take_what_a_reward_is_given_are_named_when_they_are_made():
    for wrong in (lambda images: images, lambda images, prompts: images, lambda *, images: images):
        with pytest.raises(TypeError, match=r"a reward function takes \(images, prompts, metadata\), but .* takes \("):
            make_reward(wrong)
    for right in (lambda *given: given, lambda images, prompts, metadata, more=1: images, nn.Identity()):
        assert isinstance(make_reward(right), CallableReward)
    with pytest.raises(TypeError, match=r"must not be a class, but one that was made of it: Judge\(\.\.\.\)"):
        make_reward(Judge)


def test_values_on_another_device_are_named():
    meta = torch.ones(2, device="meta")
    for output in (RewardOutput(meta), RewardOutput(torch.ones(2), {"extra": meta})):
        with pytest.raises(
            ValueError, match=r"'judge' must be on the images' device, cpu; got meta: return values\.to\("
        ):
            checked_output(Judge(output), pictures(2), ["a"] * 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_bytes_are_made_of_a_picture_that_is_none(value):
    images = pictures(3)
    images[1, 0, 5, 5] = value
    with pytest.raises(ValueError, match=r"the images \[1\] of 3 are NaN or infinite"):
        to_uint8(images)
    for name in ("incompressibility", "compressibility"):
        with pytest.raises(ValueError, match="NaN or infinite"):
            make_reward(name)(images, ["a"] * 3)
    for name in ("brightness", "emoji_alignment"):
        assert not make_reward(name)(images, ["a"] * 3).values[1].isfinite()


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "from diffusion_gym.rewards import Reward, RewardOutput\n"
        "def redness(images, prompts, metadata):\n    return images[:, 0].mean((1, 2))\n"
        "class Scaled(Reward):\n"
        "    name = 'scaled'\n"
        "    def __init__(self, scale=1.0):\n        self.scale = scale\n"
        "    def __call__(self, images, prompts, metadata=None):\n"
        "        return RewardOutput(self.scale * images.mean((1, 2, 3)))\n"
        "ready = Scaled(2.0)\n"
        "class Inside:\n    redness = staticmethod(redness)\n"
        "number = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_python_functions_and_classes_have_names_too(own_rewards):
    images = pictures(2)
    for name in ("own_rewards:redness", "own_rewards:Inside.redness"):
        assert torch.equal(make_reward(name)(images, ["a"] * 2).values, images[:, 0].mean((1, 2)))
        assert make_reward(name).name == "redness"
    for name, options in (("own_rewards:Scaled", {"scale": 2.0}), ("own_rewards:ready", None)):
        values = make_reward(name, options=options)(images, ["a"] * 2).values
        assert torch.equal(values, 2 * images.mean((1, 2, 3)))
    both = make_reward({"own_rewards:redness": 1.0, "brightness": 1.0})
    assert set(both(images, ["a"] * 2).extras) == {"redness", "brightness"}


def test_what_is_not_there_is_named(own_rewards):
    for name, message in (
        ("own_rewards:rednes", r"unknown name in own_rewards 'rednes': .* Did you mean 'redness'\?"),
        ("own_rewards:", "unknown name in own_rewards ''"),
        ("nowhere_at_all:redness", "module 'nowhere_at_all', which Python does not find: .* PYTHONPATH"),
        ("nowhere.at.all:redness", "module 'nowhere.at.all', which"),
        ("own_rewards:number", "must be a name, a Reward, a callable"),
    ):
        with pytest.raises(ValueError, match=message):
            make_reward(name)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        make_reward("broken_rewards:redness")


def test_options_are_the_keywords_of_a_named_reward():
    assert make_reward("emoji_alignment", options={"among": ["a fox", "a bear"]}).unit == "nat"
    for reward, message in (
        ("brightness", r"brightness does not take these options: .*'scale'.*; it is brightness\("),
        (make_reward("brightness"), r"options are the keywords of a reward that is named, got {'scale': 2}"),
        ({"brightness": 1.0}, "options are the keywords of a reward that is named"),
    ):
        with pytest.raises(ValueError, match=message):
            make_reward(reward, options={"scale": 2})


def test_making_a_reward_makes_it_ready_and_all_that_it_is_made_of():
    class Counted(Judge):
        readied = 0

        def make_ready(self):
            self.readied += 1

    made = Counted(None)
    makers = (make_reward, at_least_0, Cached, Timed, Normalised, Retry, lambda it: WeightedSum([(it, 1.0)]))
    for number, make in enumerate(makers, start=1):
        make(made)
        assert made.readied == number


class WithoutFloat64(torch.Tensor):
    """Stands for a tensor on a device without float64: what stays there must not become one."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


def test_statistics_are_in_float64_on_the_host_alone():
    reward = Normalised(lambda images, prompts, metadata: images.mean((1, 2, 3)))
    reward(pictures(4).as_subclass(WithoutFloat64), ["a"] * 4)
    assert reward.count == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cached(Timed("brightness")),
        lambda: make_reward({"brightness": 1.0, "incompressibility": 2.0}),
        lambda: Threshold(Normalised("emoji_alignment"), 0.1),
        lambda: make_reward("emoji_alignment", options={"among": ["a"]}),
        lambda: Retry(lambda images, prompts, metadata: np.ones(len(images))),
    ],
)
def test_rewards_are_float32_whatever_torchs_default_is(make):
    images = pictures(2)
    expected = make()(images, ["a"] * 2)
    torch.set_default_dtype(torch.float64)
    try:
        output = make()(images, ["a"] * 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert output.values.dtype == torch.float32
    assert all(values.dtype == torch.float32 for values in output.extras.values())
    torch.testing.assert_close(output.values, expected.values)
