import numpy as np
import pytest
from scipy import stats

from agents.evaluation.statistics import (
    distance_between,
    distance_within,
    mean_interval,
    probability_of_no_rise,
    ratio_interval,
)


def unit_vectors(*shape):
    vectors = np.random.default_rng(0).normal(size=shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_the_interval_is_students():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    interval = mean_interval(values)
    expected = stats.t.interval(0.95, 3, loc=4.0, scale=stats.sem(values))
    assert interval.mean == 4.0
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert mean_interval(values, confidence=0.5).low > interval.low


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(3.0, 2.0, 12)) for _ in range(2000)]
    assert np.mean([low <= 3.0 <= high for _, low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def test_the_ratios_interval_is_that_of_resampled_means():
    rng = np.random.default_rng(1)
    numerators, denominators = rng.normal(1.0, 0.3, 30), rng.normal(2.0, 0.3, 40)
    interval = ratio_interval(numerators, denominators)
    assert interval.mean == pytest.approx(numerators.mean() / denominators.mean())
    resampled = [rng.choice(numerators, 30).mean() / rng.choice(denominators, 40).mean() for _ in range(9_999)]
    assert (interval.low, interval.high) == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.01)
    assert interval == ratio_interval(numerators, denominators)


def test_there_is_no_share_of_a_gain_that_may_be_none():
    assert ratio_interval(np.ones(5), np.array([-1.0, 1.0, 0.5, -0.2])) is None


def test_a_rise_is_sure_only_where_it_is():
    rises = np.random.default_rng(0).normal(1.0, 0.5, 20)
    assert probability_of_no_rise(rises) < 1e-4
    assert probability_of_no_rise(-rises) > 0.99
    assert probability_of_no_rise(np.zeros(5)) == 1.0


def test_distances_are_means_over_pairs():
    features, others = unit_vectors(3, 4, 5), unit_vectors(3, 4, 5)[::-1]
    for prompt in range(3):
        pairs = [1 - features[prompt, i] @ features[prompt, j] for i in range(4) for j in range(i)]
        assert distance_within(features)[prompt] == pytest.approx(np.mean(pairs))
        moved = [1 - features[prompt, i] @ others[prompt, i] for i in range(4)]
        assert distance_between(features, others)[prompt] == pytest.approx(np.mean(moved))
    assert distance_between(features, features) == pytest.approx(0)
