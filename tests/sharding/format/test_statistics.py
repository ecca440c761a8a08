from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.format.statistics import PERCENTILES, Histogram
from sharding.prepare.options import STEP


def image(seed: int, bands: int = 2) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    return np.random.default_rng(seed).integers(0, 65536, (3, bands, 7, 5), dtype=np.uint16)


def test_statistics_are_numpys() -> None:
    values = np.moveaxis(image(0), -3, 0).reshape(2, -1).astype(np.float64)
    got = Histogram.of(image(0)).statistics()
    assert got["mean"] == pytest.approx(values.mean(1) * STEP, rel=1e-12)
    assert got["std"] == pytest.approx(values.std(1) * STEP, rel=1e-12)
    assert got["min"] == pytest.approx(values.min(1) * STEP, rel=1e-12)
    assert got["max"] == pytest.approx(values.max(1) * STEP, rel=1e-12)
    for percent in PERCENTILES:
        expected = np.percentile(values, percent, axis=1, method="inverted_cdf") * STEP
        assert got["percentiles"][str(percent)] == pytest.approx(expected, rel=1e-12)


@given(st.permutations(range(5)))
def test_the_order_of_addition_changes_nothing(order: list[int]) -> None:
    parts = [Histogram.of(image(seed)) for seed in range(5)]
    assert reduce(add, (parts[i] for i in order)) == reduce(add, parts)


def test_a_constant_band_has_no_deviation() -> None:
    got = Histogram.of(np.full((1, 4, 4), 7, np.uint16)).statistics()
    assert got["std"] == [0]
    assert got["percentiles"]["50"] == got["mean"] == pytest.approx([7 * STEP])


def test_text_and_back() -> None:
    histogram = Histogram.of(image(3))
    assert Histogram.from_text(histogram.to_text()) == histogram


@pytest.mark.parametrize("text", ["", "no base64!", "AAAA"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of three kinds
        Histogram.from_text(text)
