"""The search finds the least of every unimodal metric, says where one is not, and asks the network once for each."""

import math

import pytest
import torch

from diffusion_gym.consistency.time_search import bump_of, search_times, ternary_minimum
from diffusion_gym.grids import grid_through
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import write_mixture
from diffusion_gym.samplers import Consistency
from diffusion_gym.sampling import sample_latents
from tests.tiny import make_tiny_latent_consistency

STD = 0.5
CANDIDATES = [float(time) for time in range(999, 0, -40)]


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    """A single Gaussian, N((1, −1), ½²·I), of whose sampling everything is known."""
    folder = tmp_path_factory.mktemp("gaussian") / "model"
    return load_model(write_mixture(folder, [[1.0, -1.0]], stds=[STD], names=["here"]))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9, 20])
def test_a_ternary_search_finds_the_least_of_every_valley(size):
    for least in range(size):
        for slope in (1.0, 5.0):
            asked = set()

            def valley(index, least=least, slope=slope, asked=asked):
                asked.add(index)
                return slope * (least - index) if index < least else (index - least) / slope

            assert ternary_minimum(valley, size) == least
            assert len(asked) <= 5 * math.log(size) + 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 0),
        ([3], 0),
        ([3, 1], 0),
        ([5, 3, 3, 2, 4, 4, 9], 0),
        ([1, 2, 3], 0),
        ([3, 2, 1], 0),
        ([1, 2, 1], 1),
        ([3, 1, 4, 2, 5], 2),
        ([0, 5, 4, 6, 3], 3),
    ],
)
def test_a_bump_is_what_rises_and_falls_again(values, expected):
    assert bump_of(values) == expected


@pytest.fixture(scope="module")
def spread(gaussian):
    """The metric: minus the variance of the positions."""
    return lambda images: -float(gaussian.positions(images).double().var(0).mean())


def variance(schedule, times):
    """Return the variance of what `Consistency()` draws at these times from the mean of x_0, in closed form, [B]."""
    total = torch.zeros(())
    for number, time in enumerate(times):
        t = torch.tensor(time, dtype=torch.float64)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        total = gain**2 * (alpha**2 * total + sigma**2 if number else 1.0)
    return float(total)


def test_the_times_of_a_gaussian_are_those_of_the_closed_form(gaussian, spread):
    """The variance of two steps is greatest where σ/α is the standard deviation; of three, where all pairs say so."""
    noise = torch.randn(4000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    found = search_times(
        gaussian,
        noise,
        gaussian.encode_prompts(["here"] * len(noise)),
        spread,
        num_steps=3,
        candidates=CANDIDATES,
        sampler=Consistency(),
        batch_size=4000,
    )
    schedule, first = gaussian.schedule, CANDIDATES[0]
    best = max(CANDIDATES[1:], key=lambda time: variance(schedule, (first, time)))
    ratios = schedule.noise_ratio(torch.tensor(CANDIDATES[1:], dtype=torch.float64))
    assert best == CANDIDATES[1:][int((ratios.log() - math.log(STD)).abs().argmin())]
    two = min((times for times in found.tried if len(times) == 2), key=found.tried.get)
    assert abs(CANDIDATES.index(two[1]) - CANDIDATES.index(best)) <= 1
    others = [time for time in CANDIDATES[1:] if time != two[1]]
    three = max(
        (tuple(sorted({first, two[1], time}, reverse=True)) for time in others), key=lambda t: variance(schedule, t)
    )
    assert variance(schedule, found.times) > 0.99 * variance(schedule, three)
    assert found.value == found.tried[found.times] == min(found.tried.values())
    assert found.bump < 0.02 * variance(schedule, three)


def test_what_it_says_is_what_plain_sampling_draws(tmp_path):
    model = load_model(make_tiny_latent_consistency(tmp_path / "tiny"))
    noise = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = model.encode_prompts(["a cat", "a dog", "a fox"])
    seen = []

    def metric(images):
        seen.append(images)
        return float(images.mean())

    candidates = model.schedule.timesteps(5)[:-1].tolist()
    found = search_times(model, noise, conditioning, metric, num_steps=3, candidates=candidates, seed=7, batch_size=2)
    assert len(seen) == len(found.tried)
    for (times, value), images in zip(found.tried.items(), seen, strict=True):
        generators = [torch.Generator().manual_seed(7 + lane) for lane in range(3)]
        grid = grid_through(model.schedule, times)
        latents = sample_latents(model, noise, conditioning, grid, sampler=Consistency(), generators=generators)
        torch.testing.assert_close(model.decode(latents), images, atol=1e-4, rtol=0)
        assert value == pytest.approx(float(images.mean()))
    starts = {times[: number + 1] for times in found.tried for number in range(len(times))}
    assert found.passes == 3 * len(starts)  # one for each first part of a grid, however many grids have it
    assert found.is_unimodal == (found.bump == 0)


def test_a_third_time_is_tried_on_both_sides_of_the_second(gaussian, spread):
    noise = torch.randn(8, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    conditioning, candidates = gaussian.encode_prompts(["here"] * 8), (900.0, 600.0, 300.0, 100.0)
    found = search_times(
        gaussian, noise, conditioning, spread, num_steps=3, candidates=candidates, sampler=Consistency()
    )
    second = min((times for times in found.tried if len(times) == 2), key=found.tried.get)
    thirds = {times for times in found.tried if len(times) == 3}
    others = [time for time in candidates[1:] if time not in second]
    assert thirds == {tuple(sorted((*second, time), reverse=True)) for time in others}
    assert len({times.index(second[1]) for times in thirds}) == (2 if second[1] == 300.0 else 1)


def test_several_minima_are_said(gaussian, spread):
    """A metric of the last time alone, with two valleys: the images of a Gaussian say what that time was."""
    noise = torch.randn(500, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    conditioning = gaussian.encode_prompts(["here"] * 500)
    wave = lambda images: math.cos(200 * spread(images))  # noqa: E731
    found = search_times(
        gaussian, noise, conditioning, wave, num_steps=2, candidates=CANDIDATES, num_checks=9, sampler=Consistency()
    )
    assert not found.is_unimodal
    assert found.value == min(found.tried.values())


def test_candidates_that_cannot_be_are_named(gaussian, spread):
    noise = torch.randn(2, 2, 1, 1)
    conditioning = gaussian.encode_prompts(["here"] * 2)
    for candidates, steps, message in (
        ((1.0, 2.0), 2, "times must fall"),
        ((900.0, 1.0), 3, "num_steps=3 times cannot be chosen from 2 candidates"),
        ((900.0, 1.0), 0, "num_steps must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            search_times(gaussian, noise, conditioning, spread, num_steps=steps, candidates=candidates)
    with pytest.raises(ValueError, match=r"the metric must be finite, got nan for the times \(900.0,\)"):
        search_times(gaussian, noise, conditioning, lambda images: math.nan, num_steps=1, candidates=(900.0, 1.0))
