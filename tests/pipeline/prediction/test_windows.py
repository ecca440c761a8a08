"""Windows of a scene: they cover it, their weights sum to one, and chips of the training are among them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.chips import chip_window
from pipeline.prediction.windows import FRAME, plan_axis, window_starts


@given(st.integers(4, 60), st.integers(0, 200), st.floats(1.0, 7.0), st.integers(0, 60))
def test_weights_sum_to_one_and_windows_stay_in_the_scene(size: int, more: int, scale: float, offset: int) -> None:
    length = size + more
    hr_length = round(length * scale)
    windows = plan_axis(length, hr_length, size, offset)
    total = np.zeros(hr_length)
    for window in windows:
        assert window.lr_start >= 0
        assert window.lr_stop <= length
        total[window.hr_start : window.hr_stop] += window.weights
    assert np.allclose(total, 1, atol=1e-6)
    assert (windows[0].hr_start, windows[-1].hr_stop) == (0, hr_length)


def test_windows_are_half_a_window_apart_and_end_at_the_edge() -> None:
    assert window_starts(160, 50) == [0, 25, 50, 75, 100, 110]
    assert window_starts(160, 50, offset=12) == [0, 12, 37, 62, 87, 110]
    assert window_starts(50, 50) == [0]


def test_the_chips_of_the_training_are_among_the_windows() -> None:
    windows = {(window.lr_start, window.hr_start, len(window.weights)) for window in plan_axis(160, 500, 50)}
    for chip in range(9):
        window = chip_window(chip, 3.125)
        assert (window.x, window.hr_x, window.hr_size) in windows
        assert (window.y, window.hr_y, window.hr_size) in windows


def test_the_frame_of_a_window_counts_at_the_edge_of_the_scene_only() -> None:
    first, inner, *_, last = plan_axis(150, 300, 50)
    frame = int(FRAME * 100)
    assert inner.weights[:frame].max() <= 1e-9
    assert inner.weights[-frame:].max() <= 1e-9
    assert (first.weights[:50] == 1).all()
    assert (last.weights[-50:] == 1).all()
    assert inner.weights[50] == pytest.approx(1)
