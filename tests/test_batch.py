"""Rates of the benchmark over the global batch, by hand; nothing is trained."""

from __future__ import annotations

import pytest

from benchmarks.batch import scaled_rate


def test_rates_by_rule() -> None:
    assert scaled_rate(1e-3, 8, "linear") == 1e-3
    assert scaled_rate(1e-3, 128, "linear") == pytest.approx(16e-3)
    assert scaled_rate(1e-3, 128, "sqrt") == pytest.approx(4e-3)
    assert scaled_rate(1e-3, 128, "unscaled") == 1e-3
