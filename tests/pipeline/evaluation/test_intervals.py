"""Intervals: they cover a known truth as often as they say, and over AOIs, not chips."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.evaluation.intervals import LEAST, Estimate, estimate

Values = NDArray[np.float64]
Generator = np.random.Generator


def normal(random: Generator) -> tuple[Values, Values]:
    return random.normal(30, 3, 50), np.ones(50)


def skewed(random: Generator) -> tuple[Values, Values]:
    return random.lognormal(math.log(30), 0.5, 50) / math.exp(0.125), np.ones(50)


def clustered(random: Generator) -> tuple[Values, Values]:
    """Chips that resemble the others of their AOI, 1 to 9 an AOI."""
    counts = random.integers(1, 10, 50)
    sums = [random.normal(level, 1, count).sum() for level, count in zip(random.normal(30, 3, 50), counts, strict=True)]
    return np.array(sums), counts.astype(np.float64)


@pytest.mark.parametrize("make", [normal, skewed, clustered])
def test_intervals_of_50_aois_cover_the_truth_in_95_percent_of_400_draws(
    make: Callable[[Generator], tuple[Values, Values]],
) -> None:
    random = np.random.default_rng(1)
    found = [estimate(*make(random), seed=draw) for draw in range(400)]
    covered = np.mean([each.low <= 30 <= each.high for each in found])
    assert 0.92 <= covered <= 0.98
    assert 0.8 < np.mean([each.high - each.low for each in found]) < 12


def test_an_interval_is_the_same_each_time_and_holds_its_mean() -> None:
    values, counts = clustered(np.random.default_rng(4))
    found = estimate(values, counts)
    assert found == estimate(values, counts)
    assert found.mean == pytest.approx(values.sum() / counts.sum())
    assert found.low < found.mean < found.high
    assert str(found) == f"{found.mean:.4g} [{found.low:.4g}, {found.high:.4g}]"


def test_chips_that_repeat_their_aoi_make_no_interval_narrower() -> None:
    values = np.random.default_rng(2).normal(0, 1, 20)
    once, nine_times = estimate(values, np.ones(20)), estimate(9 * values, np.full(20, 9.0))
    assert (nine_times.low, nine_times.high) == pytest.approx((once.low, once.high))


def test_too_few_aois_and_infinite_values_have_a_mean_alone() -> None:
    few = estimate(np.ones(LEAST - 1), np.ones(LEAST - 1))
    assert few.mean == 1
    assert math.isnan(few.low)
    assert str(few) == "1"
    assert str(Estimate(math.nan, math.nan, math.nan, 0)) == "-"
    endless = estimate(np.array([math.inf, *range(9)], float), np.ones(10))
    assert endless.mean == math.inf
    assert math.isnan(endless.high)
    with pytest.raises(ValueError, match="no AOI"):
        estimate(np.empty(0), np.empty(0))


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert estimate(np.full(9, 2.0), np.ones(9)) == Estimate(2.0, 2.0, 2.0, 9)
    assert not Estimate(0.1, -0.1, 0.3, 9).excludes_zero
    assert Estimate(-0.2, -0.3, -0.1, 9).excludes_zero
