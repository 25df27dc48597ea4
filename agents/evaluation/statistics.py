"""Intervals over prompts, and distances between images, as pure functions.

Images of one prompt are more alike than images of different prompts, and a claim about objects is about other objects
too. So a prompt, not an image, is one observation here: its K images are averaged first.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

_RESAMPLES = 9_999


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Return the mean of P ≥ 2 values with Student's interval: mean ± t_{P−1}·s/√P."""
    mean, error = float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
    reach = error * float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    return Interval(mean, mean - reach, mean + reach)


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, *, confidence: float = 0.95, seed: int = 0
) -> Interval | None:
    """Return the ratio of two means with its percentile bootstrap interval; None: the denominator may well be 0.

    Both samples are resampled independently, 9,999 times (`scipy.stats.bootstrap`).

    Args:
        numerators: [P] a value for each prompt of one set.
        denominators: [P'] of another.
        confidence: The share of such intervals that hold the true ratio.
        seed: The seed of the resampling.
    """
    denominator = mean_interval(denominators, confidence=confidence)
    if denominator.low <= 0 <= denominator.high:
        return None

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.mean(axis) / b.mean(axis)

    bounds = stats.bootstrap(
        (numerators, denominators),
        ratio,
        n_resamples=_RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(ratio(numerators, denominators)), float(bounds.low), float(bounds.high))


def probability_of_no_rise(differences: np.ndarray) -> float:
    """Return the one-sided p-value of Student's test that the mean of P ≥ 2 paired differences is above 0."""
    if not differences.any():
        return 1.0
    return float(stats.ttest_1samp(differences, 0.0, alternative="greater").pvalue)


def distance_within(features: np.ndarray) -> np.ndarray:
    """Return the diversity of a prompt's K ≥ 2 images, [P]: the mean of 1 − cosine over their pairs.

        1 − (‖Σ_k f_k‖² − K) / (K·(K − 1))

    Args:
        features: [P, K, F], of length 1.
    """
    num_images = features.shape[1]
    return 1 - (np.square(features.sum(1)).sum(-1) - num_images) / (num_images * (num_images - 1))


def distance_between(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the distance by which a prompt's images moved, [P]: the mean of 1 − cosine over pairs from the same noise.

    Args:
        features: [P, K, F], of length 1.
        others: [P, K, F], of length 1: the other policy's.
    """
    return 1 - (features * others).sum(-1).mean(1)
