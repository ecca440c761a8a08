from __future__ import annotations

import numpy as np
import pytest

from sharding.picture import robust_high, sheet, to_rgb8


def test_low_is_black_and_high_is_white() -> None:
    image = np.array([[[0.1, 0.3, 0.2, 9.0, -1.0, np.nan]]], np.float32)
    pixels = to_rgb8(image, 0.1, 0.3)
    assert pixels.shape == (1, 6, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, :, 0].tolist()[:2] == [0, 255]
    assert 0 < pixels[0, 2, 0] < 255
    assert pixels[0, 3:, 0].tolist() == [255, 0, 0]
    assert (pixels[..., 0] == pixels[..., 2]).all()  # one band is grey


def test_bands_become_colours() -> None:
    image = np.zeros((3, 2, 2), np.float32)
    image[0], image[2] = 1.0, 0.5
    red, green, blue = to_rgb8(image, 0, 1)[0, 0]
    assert (red, green) == (255, 0)
    assert 0 < blue < 255


def test_white_is_found_without_the_outliers() -> None:
    image = np.full((1, 100, 100), 0.2, np.float32)
    image[0, 0, :5] = 50
    image[0, 1, :5] = np.inf
    assert robust_high(image) == pytest.approx(0.2)
    assert to_rgb8(np.zeros((1, 4, 4), np.float32)).max() == 0
    assert robust_high(np.full((1, 2, 2), np.nan, np.float32)) == 1.0


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[2, 4, 4\]"):
        to_rgb8(np.zeros((2, 4, 4), np.float32))
    with pytest.raises(ValueError, match="at least one tile"):
        sheet([[]])


def test_a_sheet_holds_its_tiles_apart_and_under_their_labels() -> None:
    red, blue = np.zeros((20, 30, 3), np.uint8), np.zeros((40, 40, 3), np.uint8)
    red[..., 0], blue[..., 2] = 200, 200
    page = np.asarray(sheet([[("red", red), ("blue", blue)], [("a label far too long for its tile", red)]]))
    assert (page == [200, 0, 0]).all(-1).sum() == 2 * red[..., 0].size
    assert (page == [0, 0, 200]).all(-1).sum() == blue[..., 0].size
    assert (page == [230, 230, 230]).all(-1).any()  # the labels' ink


def test_tiles_are_scaled_to_one_size() -> None:
    green = np.zeros((10, 20, 3), np.uint8)
    green[..., 1] = 200
    page = np.asarray(sheet([[("x", green)]], tile_size=100))
    assert (page == [0, 200, 0]).all(-1).sum() == 100 * 50
