"""What is made of a reward: its numbers against numpy's, and what it reports of the reward within."""

import datetime
import json

import numpy as np
import pytest
import torch

from diffusion_gym.rewards import Cached, Normalised, Retry, RewardOutput, Threshold, Timed, WeightedSum, make_reward


def pictures(num, seed=0):
    return torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0, 1, num).reshape(
        -1, 1, 1, 1
    )


class Counted:
    """Brightness plus the prompt's length; counts the images that it was asked for."""

    def __init__(self):
        self.sizes = []

    def __call__(self, images, prompts, metadata):
        self.sizes.append(len(images))
        return images.mean((1, 2, 3)) + torch.tensor(
            [float(len(prompt) + len(one)) for prompt, one in zip(prompts, metadata, strict=True)]
        )


def test_running_statistics_are_those_of_all_values_so_far():
    reward = Normalised("brightness")
    seen = []
    for seed, num in enumerate([3, 1, 8, 5]):
        images = pictures(num, seed)
        output = reward(images, ["a"] * num)
        raw = images.mean((1, 2, 3))
        seen.append(raw.double().numpy())
        values = np.concatenate(seen)
        np.testing.assert_allclose(output.values, (raw - values.mean()) / values.std(), rtol=1e-5, atol=1e-6)
        assert torch.equal(output.extras["brightness"], raw)
        assert (reward.count, reward.mean, reward.std) == (
            len(values),
            pytest.approx(values.mean()),
            pytest.approx(values.std()),
        )
    assert (reward.name, reward.unit) == ("normalised_brightness", "standard deviations")
    assert reward.range == (-float("inf"), float("inf"))


def test_statistics_of_values_far_from_0_are_precise():
    offset = 1e6
    reward = Normalised(lambda images, prompts, metadata: images.mean((1, 2, 3)).double() + offset)
    values = []
    for seed in range(20):
        values.append(reward(pictures(8, seed), ["a"] * 8).extras["<lambda>"].double().numpy())
    assert reward.std == pytest.approx(np.concatenate(values).std(), rel=1e-9)


def test_rounding_is_not_made_a_signal():
    values = torch.tensor([21.3, 21.3 + 2e-6, 21.3, 21.3 - 2e-6])
    reward = Normalised(lambda images, prompts, metadata: values)
    assert 0 < values.std() < 1e-5
    assert reward(pictures(4), ["a"] * 4).values.tolist() == [0.0] * 4
    values = torch.tensor([21.3, 21.4, 21.2, 21.3])
    assert reward(pictures(4), ["a"] * 4).values.abs().max() > 1


def test_given_statistics_make_it_a_function():
    reward = Normalised("incompressibility", mean=2.0, std=0.5)
    images = pictures(4)
    expected = (make_reward("incompressibility")(images, ["a"] * 4).values - 2) / 0.5
    for _ in range(2):
        assert torch.equal(reward(images, ["a"] * 4).values, expected)
    assert reward.range == (-4.0, float("inf"))
    assert reward.state_dict() == {}


def test_learning_ends_where_it_is_told_to():
    reward = Normalised("brightness", learn_from=6)
    for seed in range(3):
        reward(pictures(4, seed), ["a"] * 4)
    assert reward.count == 8
    first = np.concatenate([pictures(4, seed).mean((1, 2, 3)) for seed in range(2)])
    assert reward.mean == pytest.approx(first.mean())


def test_equal_values_and_values_that_are_none_leave_it_whole():
    reward = Normalised("brightness")
    assert reward(torch.full((3, 3, 2, 2), 0.25), ["a"] * 3).values.tolist() == [0.0] * 3
    broken = torch.full((2, 3, 2, 2), float("nan"))
    assert reward(broken, ["a"] * 2).values.isnan().all()
    assert (reward.count, reward.mean) == (3, 0.25)


def test_its_state_goes_through_json_and_sums():
    def make():
        return WeightedSum([(Normalised("brightness"), 1.0), (Threshold(Normalised("compressibility"), 0.0), 0.5)])

    first, second = make(), make()
    first(pictures(5), ["a"] * 5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    images = pictures(3, seed=1)
    assert torch.equal(first(images, ["a"] * 3).values, second(images, ["a"] * 3).values)
    assert make_reward({"brightness": 1.0}).state_dict() == {}
    for other in (make_reward("brightness"), Normalised("brightness"), make_reward({"brightness": 1.0})):
        with pytest.raises(ValueError, match=r"remembers nothing|the state given is not that of"):
            other.load_state_dict(first.state_dict())
    alone = Normalised("brightness")
    alone(pictures(5), ["a"] * 5)
    for of_another in (alone.state_dict(), {"reward": first.state_dict()}):
        with pytest.raises(ValueError, match="the state given is not that of"):
            make().load_state_dict(of_another)
    fresh = make()
    fresh.load_state_dict({})
    assert fresh.state_dict() == make().state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": 1.0}, "given together"),
        ({"mean": 1.0, "std": 0.0}, "std must be a finite number in"),
        ({"mean": 1.0, "std": float("inf")}, "std must be a finite number"),
        ({"mean": float("nan"), "std": 1.0}, "mean must be a finite number"),
        ({"learn_from": 0}, "learn_from must be an integer of at least 1"),
        ({"mean": 1.0, "std": 1.0, "learn_from": 5}, "given where mean and std are not"),
    ],
)
def test_wrong_statistics_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Normalised("brightness", **arguments)


def test_threshold_counts_its_own_value_as_reached():
    images = torch.tensor([0.25, 0.5, 0.75]).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    reward = Threshold("brightness", 0.5)
    output = reward(images, ["a"] * 3)
    assert output.values.tolist() == [0.0, 1.0, 1.0]
    assert output.extras["brightness"].tolist() == [0.25, 0.5, 0.75]
    assert (reward.name, reward.range) == ("brightness_from_0.5", (0.0, 1.0))
    assert reward(images * float("nan"), ["a"] * 3).values.isnan().all()
    for at in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the threshold `at` must be a finite number"):
            Threshold("brightness", at)


def test_timed_reports_seconds_per_image(monkeypatch):
    clock = iter([10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr("diffusion_gym.rewards.compositions.time.perf_counter", lambda: next(clock))
    reward = Timed("incompressibility")
    output = reward(pictures(8), ["a"] * 8)
    assert output.extras["incompressibility_seconds"].tolist() == [0.5] * 8
    assert torch.equal(output.values, make_reward("incompressibility")(pictures(8), ["a"] * 8).values)
    reward(pictures(2), ["a"] * 2)
    assert (reward.seconds, reward.num_images) == (5.0, 10)
    assert (reward.name, reward.unit) == ("incompressibility", "kB")


def test_cached_asks_once_for_the_same_picture_prompt_and_metadata():
    counted = Counted()
    reward = Cached(Normalised(counted, mean=0.0, std=2.0))
    images = pictures(3)[[0, 1, 0, 0, 0]]
    prompts, metadata = ["a", "a", "a", "bb", "a"], [{}, {}, {}, {}, {"n": 1}]
    expected = Counted()(images, prompts, metadata)
    output = reward(images, prompts, metadata)
    assert torch.equal(output.values, expected / 2)
    assert torch.equal(output.extras["Counted"], expected)
    assert (reward.hits, reward.misses, counted.sizes) == (1, 4, [4])
    again = reward(images.flip(0), prompts[::-1], metadata[::-1])
    assert torch.equal(again.values, expected.flip(0) / 2)
    assert torch.equal(again.extras["Counted"], expected.flip(0))
    assert (reward.hits, reward.misses, counted.sizes) == (6, 4, [4])
    reward(images.double()[:1], prompts[:1], metadata[:1])
    assert reward.misses == 5


def test_cached_forgets_what_was_not_asked_for_the_longest():
    counted = Counted()
    reward = Cached(counted, size=2)
    one, two, three = pictures(4)[1:].split(1)
    for images in (one, two, one, three, one, two):
        reward(images, ["a"], [{}])
    assert (reward.hits, counted.sizes) == (2, [1] * 4)
    assert torch.equal(
        reward(torch.cat([one, two, three]), ["a"] * 3, [{}] * 3).values,
        Counted()(pictures(4)[1:], ["a"] * 3, [{}] * 3),
    )
    with pytest.raises(ValueError, match="size must be an integer of at least 1"):
        Cached("brightness", size=0)
    with pytest.raises(ValueError, match="normalised_brightness remembers what it saw"):
        Cached(Normalised("brightness"))


def test_cached_takes_metadata_of_numpy_and_dates():
    counted = Counted()
    metadata = [{"n": np.int64(3), "day": datetime.date(2026, 1, 2), "row": np.ones(2, dtype=np.float32)}] * 2
    Cached(counted)(pictures(1).expand(2, -1, -1, -1), ["a"] * 2, metadata)
    assert counted.sizes == [1]


class Failing:
    """Brightness, once the failures that are planned are over: errors, or the rows that are NaN."""

    def __init__(self, *plan):
        self.plan, self.asked = list(plan), []

    def __call__(self, images, prompts, metadata):
        self.asked.append((prompts, metadata))
        values = images.mean((1, 2, 3))
        failure = self.plan.pop(0) if self.plan else []
        if isinstance(failure, Exception):
            raise failure
        values[failure] = float("nan")
        return values


@pytest.fixture
def waits(monkeypatch):
    waits = []
    monkeypatch.setattr("diffusion_gym.rewards.compositions.time.sleep", waits.append)
    return waits


def test_a_reward_that_fails_is_asked_again(waits, caplog):
    failing = Failing(ConnectionError("away"), [0, 2], [1])
    reward = Retry(failing, backoff=0.5)
    images, prompts, metadata = pictures(4), list("abcd"), [{"n": n} for n in range(4)]
    output = reward(images, prompts, metadata)
    assert torch.equal(output.values, images.mean((1, 2, 3)))
    assert [prompts for prompts, _ in failing.asked] == [list("abcd"), list("abcd"), ["a", "c"], ["c"]]
    assert failing.asked[-1][1] == [{"n": 2}]
    assert waits == [0.5, 1.0, 2.0]
    assert reward.num_retries == 3
    assert "try 1 of 4: ConnectionError: away; again in 0.5 s" in caplog.text
    assert "try 2 of 4: NaN or infinity for 2 of 4 images" in caplog.text
    assert (reward.name, reward.unit, reward.range) == ("Failing", "1", (-float("inf"), float("inf")))


def test_after_the_last_try_the_error_and_the_nan_are_the_rewards_own(waits):
    with pytest.raises(ConnectionError, match="two"):
        Retry(Failing(ConnectionError("one"), ConnectionError("two")), tries=2)(pictures(2), ["a"] * 2)
    values = Retry(Failing([1], [0]), tries=2)(pictures(2), ["a"] * 2).values
    assert values.isnan().tolist() == [False, True]
    assert waits == [1.0, 1.0]


def test_what_no_other_try_can_mend_is_raised_at_once(waits):
    failing = Failing(KeyError("a bug"))
    with pytest.raises(KeyError, match="a bug"):
        Retry(failing, errors=(OSError,))(pictures(2), ["a"] * 2)
    with pytest.raises(ValueError, match="must return a RewardOutput"):
        Retry(make_reward(Bare()))(pictures(2), ["a"] * 2)
    assert waits == []


class Bare(type(make_reward("brightness"))):
    def __call__(self, images, prompts, metadata=None):
        return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tries": 0}, "tries must be an integer"),
        ({"tries": 2.0}, "tries"),
        ({"backoff": float("nan")}, "backoff must"),
    ],
)
def test_wrong_retries_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Retry("brightness", **arguments)
    with pytest.raises(ValueError, match="normalised_brightness remembers what it saw: retry the reward within it"):
        Retry(Normalised("brightness"))


def test_extras_never_stand_in_for_a_rewards_own_values():
    class Confused(Bare):
        def __call__(self, images, prompts, metadata=None):
            values = images.mean((1, 2, 3))
            return RewardOutput(values, {"brightness": values - 7})

    images = pictures(3)
    for made in (
        Threshold(Confused(), 0.5),
        Normalised(Confused(), mean=0.0, std=1.0),
        WeightedSum([(Confused(), 1.0)]),
    ):
        assert torch.equal(made(images, ["a"] * 3).extras["brightness"], images.mean((1, 2, 3)))
