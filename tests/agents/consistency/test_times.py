"""Pairs of times: Karras' levels, LCM's skipping steps, and the published numbers of levels."""

import math

import pytest
import torch

from agents.consistency import (
    DoublingLevels,
    EveryIndex,
    GrowingLevels,
    KarrasLevels,
    LogNormalTimes,
    ShrinkingGap,
    UniformTimes,
)
from diffusion_gym.models import load_model
from diffusion_gym.schedules import ConsistencySchedule, FlowSchedule, KarrasSchedule

EXPLODING = ConsistencySchedule()


@pytest.fixture(scope="module")
def preserving():
    return load_model("emoji").schedule


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_levels_are_karras(preserving):
    levels = KarrasLevels(40).levels(EXPLODING, 0.002, 0.0)
    torch.testing.assert_close(levels.flip(0), KarrasSchedule().timesteps(40)[:-1])
    ratios = preserving.noise_ratio(KarrasLevels(40).levels(preserving, 0.0, 0.0)) ** (1 / 7)
    torch.testing.assert_close(ratios.diff(), ratios.diff().mean().expand(39), rtol=1e-6, atol=0)


def test_every_index_is_the_grid_at_which_a_latent_model_draws(preserving):
    levels = EveryIndex(50).levels(preserving, 0.0, 0.0)
    assert levels.tolist() == [0.0, *range(49, 1000, 50)]
    with pytest.raises(ValueError, match="discrete process"):
        EveryIndex(50).levels(FlowSchedule(), 0.0, 0.0)


@pytest.mark.parametrize(
    "discretisation",
    [KarrasLevels(18), KarrasLevels(18, times=LogNormalTimes()), GrowingLevels(), DoublingLevels(), ShrinkingGap()],
    ids=repr,
)
@pytest.mark.parametrize("progress", [0.0, 0.5, 0.999])
def test_the_second_time_is_cleaner(preserving, discretisation, progress):
    for schedule, boundary in ((EXPLODING, 0.002), (preserving, 0.0)):
        t, s = discretisation.pairs(schedule, boundary, progress=progress, count=500, generator=generator())
        assert t.dtype == s.dtype == torch.float32
        assert bool((s < t).all())
        assert float(s.min()) >= torch.tensor(boundary)
        assert float(t.max()) <= schedule.max_time


@pytest.mark.parametrize(("k", "levels"), [(0.0, 2), (0.5, 107), (1.0, 151)])
def test_consistency_training_s_number_of_levels_is_the_paper_s(k, levels):
    assert GrowingLevels(2, 150).num_levels(k) == levels


def test_improved_training_s_levels_double_in_equal_stages():
    numbers = [DoublingLevels(10, 1280).num_levels(k / 8 + 1e-9) for k in range(8)]
    assert numbers == [11, 21, 41, 81, 161, 321, 641, 1281]


def test_the_gap_is_halved_in_each_stage():
    gaps = []
    for stage in range(1, 4):
        progress = stage / 8  # past the first, where s is the boundary
        t, s = ShrinkingGap(k=0.0).pairs(EXPLODING, 0.002, progress=progress, count=200, generator=generator())
        seen = t > 1
        gaps.append(float((1 - s[seen] / t[seen]).mean()))
    torch.testing.assert_close(torch.tensor(gaps), torch.tensor([1 / 4, 1 / 8, 1 / 16]), rtol=1e-4, atol=0)
    t, s = ShrinkingGap().pairs(EXPLODING, 0.002, progress=0.0, count=200, generator=generator())
    assert bool((s[t < 1] == torch.tensor(0.002)).all())


def test_log_normal_times_have_their_distribution():
    levels = KarrasSchedule().timesteps(40)[:-1].flip(0)
    index = LogNormalTimes(-1.1, 2.0).intervals(levels, 20_000, generator())
    share = torch.bincount(index, minlength=39)[:39] / 20_000
    cumulative = torch.special.ndtr((levels.log() + 1.1) / 2.0)
    expected = cumulative.diff() / cumulative.diff().sum()
    assert (share - expected).abs().max() < 4 * math.sqrt(0.25 / 20_000)
    uniform = torch.bincount(UniformTimes().intervals(levels, 20_000, generator()), minlength=39) / 20_000
    assert (uniform - 1 / 39).abs().max() < 4 * math.sqrt(0.25 / 20_000)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KarrasLevels(1),
        lambda: KarrasLevels(rho=0),
        lambda: EveryIndex(0),
        lambda: GrowingLevels(5, 4),
        lambda: DoublingLevels(5, 4),
        lambda: ShrinkingGap(base=1.0),
        lambda: LogNormalTimes(std=0.0),
    ],
)
def test_numbers_out_of_their_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
