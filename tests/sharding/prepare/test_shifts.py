"""Shifts between revisits are measured in pixels."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from sharding.prepare.shifts import revisit_shifts, shift_between


def land(dy: float, dx: float, side: int = 80) -> NDArray[np.float64]:
    """Rough land, moved down and right by resampling its spectrum."""
    rng = np.random.default_rng(1)
    rows, columns = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    spectrum = np.fft.fft2(rng.standard_normal((side, side))) / (0.05 + np.hypot(rows, columns))
    return np.asarray(np.fft.ifft2(spectrum * np.exp(-2j * np.pi * (rows * dy + columns * dx))).real)


@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (3, -2), (0.5, 0.25), (-1.3, 2.7)])
def test_a_known_shift_is_found(dy: float, dx: float) -> None:
    assert shift_between(land(dy, dx), land(0, 0)) == pytest.approx((dy, dx), abs=0.15)


def test_a_revisit_without_common_land_has_no_shift() -> None:
    noise = np.random.default_rng(2).standard_normal((80, 80))
    lr = np.stack([land(0, 0), land(1, 0), land(0, 0), noise])[:, None].repeat(3, 1)
    shifts = revisit_shifts(lr, (0, 1, 2))
    assert shifts[3] is None
    assert shifts[1] == pytest.approx((1, 0), abs=0.3)
    assert revisit_shifts(lr[:1], (0, 1, 2)) == [None]
