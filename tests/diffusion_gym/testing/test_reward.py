"""`check_reward` lets this package's rewards pass, and refuses those that break the contract, each in one way."""

import random

import numpy as np
import pytest
import torch

from diffusion_gym.rewards import Normalised, Reward, RewardOutput, Threshold, Timed
from diffusion_gym.testing import check_reward


class Redness(Reward):
    """A reward that keeps the contract."""

    name = "redness"
    range = (0.0, 1.0)

    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(images[:, 0].mean((1, 2)))


class HasNoName(Redness):
    name = ""


class RangeIsReversed(Redness):
    range = (1.0, 0.0)


class ReturnsATensor(Redness):
    def __call__(self, images, prompts, metadata=None):
        return images.mean((1, 2, 3))


class ReturnsAMean(Redness):
    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(images.mean())


class ReturnsAColumn(Redness):
    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(images[:, 0].mean((1, 2))[:, None])


class ReturnsDoubles(Redness):
    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(images[:, 0].double().mean((1, 2)))


class ReturnsOnAnotherDevice(Redness):
    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(torch.zeros(len(images), device="meta"))


class LeavesItsRange(Redness):
    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(2 * images[:, 0].mean((1, 2)))


class IsNaNForBlack(Redness):
    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(images[:, 0].sum((1, 2)) / images.sum((1, 2, 3)))


class IsInfiniteForBlack(Redness):
    range = (0.0, float("inf"))

    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(1 / images.mean((1, 2, 3)))


class IsRandom(Redness):
    source = random.Random(0)

    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(images.mean((1, 2, 3)) * self.source.random())


class ComparesWithTheBatch(Redness):
    range = (-1.0, 1.0)

    def __call__(self, images, prompts, metadata=None):
        values = images[:, 0].mean((1, 2))
        return RewardOutput(values - values.mean())


class GivesTheFirstABonus(Redness):
    def __call__(self, images, prompts, metadata=None):
        values = images[:, 0].mean((1, 2)) / 2
        values[0] += 0.5
        return RewardOutput(values)


class ReadsTheMemory(Redness):
    def __call__(self, images, prompts, metadata=None):
        flat = torch.as_strided(images, (len(images), 3 * 64), (images.stride(0), 1))
        return RewardOutput(flat.mean(1))


class WritesIntoTheImages(Redness):
    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(images.mul_(0.5)[:, 0].mean((1, 2)))


class WritesIntoThePrompts(Redness):
    def __call__(self, images, prompts, metadata=None):
        prompts[0] = prompts[0].upper()
        return super().__call__(images, prompts)


class WritesIntoTheMetadata(Redness):
    def __call__(self, images, prompts, metadata=None):
        for entry in metadata or []:
            entry["seen"] = True
        return super().__call__(images, prompts)


class ReturnsAView(Redness):
    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(images[:, 0, 0, 0])


class ReusesABuffer(Redness):
    def __call__(self, images, prompts, metadata=None):
        values = super().__call__(images, prompts).values
        if len(values) == 4:
            self.buffer = self.__dict__.get("buffer", values)
            self.buffer.copy_(values)
            return RewardOutput(self.buffer)
        return RewardOutput(values)


class KeepsAnObject(Redness):
    def state_dict(self):
        return {"values": np.zeros(2)}

    def load_state_dict(self, state):
        pass


class ForgetsItsMemory(Redness):
    count = 0

    def __call__(self, images, prompts, metadata=None):
        self.count += 1
        return super().__call__(images, prompts)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = 0


class HasAnExtraOfOne(Redness):
    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(images[:, 0].mean((1, 2)), {"size": torch.tensor(64.0)})


BROKEN = {
    HasNoName: "must have a name, a text that is not empty, got ''",
    RangeIsReversed: r"range of the reward 'redness' must be \(least, greatest\), got \(1.0, 0.0\)",
    ReturnsATensor: r"the reward 'redness' must return a RewardOutput\(values\), got tensor",
    ReturnsAMean: r"must be one value per image, \[4\] real numbers, got \[\] of torch.float32",
    ReturnsAColumn: r"must be one value per image, \[4\] real numbers, got \[4, 1\]",
    ReturnsDoubles: r"values: must be float32, got torch.float64: return values.float\(\)",
    ReturnsOnAnotherDevice: "must be on the images' device, cpu; got meta",
    LeavesItsRange: r"values\[0\]: must be finite and in its range \(0.0, 1.0\), got 1.0\d+ for 'a cat'",
    IsNaNForBlack: r"values\[2\]: must be finite and in its range .*, got nan for 'two houses'",
    IsInfiniteForBlack: r"values: must be finite, got \[.*inf.*\]",
    IsRandom: "values: the same batch must have the same rewards: they differ by",
    ComparesWithTheBatch: "image 0 must have the same reward alone as in a batch of 4: they differ by",
    GivesTheFirstABonus: "an image's reward must not depend on its place",
    ReadsTheMemory: "an image's reward must not depend on its memory layout",
    WritesIntoTheImages: r"reward\(images=…\): must not change its argument",
    WritesIntoThePrompts: r"reward\(prompts=…\): must not change its argument",
    WritesIntoTheMetadata: r"reward\(metadata=…\): must not change its argument",
    ReturnsAView: "reward: what it returns.values shares memory with images: return a copy",
    ReusesABuffer: "values: was changed by a later call: return a copy, not a buffer",
    KeepsAnObject: r"state_dict\(\): must be what JSON can hold",
    ForgetsItsMemory: r"load_state_dict: must give back what state_dict\(\) returned",
    HasAnExtraOfOne: "the extra 'size' of the reward 'redness' must be one value per image",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_broken_rewards_are_refused(kind):
    with pytest.raises(AssertionError, match=BROKEN[kind]):
        check_reward(kind())


class DrawsNoise(Redness):
    def __call__(self, images, prompts, metadata=None):
        torch.manual_seed(0)
        return RewardOutput(images[:, 0].mean((1, 2)) * torch.rand(()))


class Trains(Redness):
    def __init__(self):
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def __call__(self, images, prompts, metadata=None):
        return RewardOutput(self.weight * images[:, 0].mean((1, 2)))


class NeedsMetadata(Redness):
    def __call__(self, images, prompts, metadata=None):
        assert len(metadata) == len(images)
        return super().__call__(images, prompts)


class HoldsAFunction(Redness):
    def __init__(self):
        self.function = lambda images: images


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (DrawsNoise, "it leaves the global generators alone", "draws from or seeds a generator"),
        (Trains, "it carries no gradient", "freeze its networks"),
        (NeedsMetadata, "it needs no metadata", "without metadata it raises TypeError"),
        (HoldsAFunction, "it can be pickled", "it raises"),
    ],
)
def test_weaknesses_are_reported_and_refused_where_the_check_is_strict(kind, name, message):
    report = check_reward(kind())
    assert set(report.weaknesses) == {name}
    assert message in report.weaknesses[name]
    assert name not in report.holds
    with pytest.raises(AssertionError, match=message):
        check_reward(kind(), strict=True)


@pytest.mark.parametrize(
    "reward",
    [
        "incompressibility",
        "compressibility",
        "brightness",
        {"brightness": 2.0, "compressibility": 1.0},
        Normalised("brightness", mean=0.5, std=0.2),
        Threshold(Timed("brightness"), 0.3),
        Redness(),
    ],
    ids=lambda reward: reward if isinstance(reward, str) else type(reward).__name__,
)
def test_rewards_pass_without_a_weakness(reward):
    check_reward(reward, strict=True)


def test_the_embedded_scorer_passes():
    check_reward("emoji_alignment", prompts=["a cat", "a dog", "a fox"], strict=True)


def test_a_reward_that_learns_is_said_to_depend_on_its_batch():
    reward = Normalised("brightness")
    report = check_reward(reward)
    assert report.weaknesses == {}
    assert report.unchecked == {
        "an image's reward does not depend on the others": "it learns from batches, so that it does"
    }


def test_a_function_of_a_module_passes_and_a_lambda_cannot_be_pickled():
    report = check_reward(lambda images, prompts, metadata: images.mean((1, 2, 3)))
    assert set(report.weaknesses) == {"it can be pickled"}
    assert str(report).startswith("reward '<lambda>' (CallableReward) on cpu\n  holds      name, unit, range\n")


def test_what_the_check_needs_is_named():
    with pytest.raises(ValueError, match="give at least two prompts, and metadata for each"):
        check_reward("brightness", prompts=["a cat"])
    with pytest.raises(ValueError, match="unknown reward 'britness'"):
        check_reward("britness")
