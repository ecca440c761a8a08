"""Choice of revisits by their clouds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.clouds import MOST_HIDDEN, choose, clear_shares
from pipeline.config import DataConfig, load_config
from sharding.errors import UserError


def test_shares_count_pixels_with_data_and_without_cloud() -> None:
    lr = np.ones((4, 2, 4, 5), np.uint16)
    clm = np.zeros((4, 1, 4, 5), np.uint8)
    clm[1, 0, :, 0] = 1  # a column of five is cloud
    lr[2, :, 0] = 0  # a row of four holds no data
    lr[2, 1, 0, 0] = 7  # but for a pixel
    clm[3] = 255  # nothing is known
    assert clear_shares(lr, clm) == pytest.approx([1, 0.8, 1 - 4 / 20, 1])


@pytest.mark.parametrize(
    ("shares", "keep", "drop", "weight"),
    [
        ((1, 1, 1, 1), (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)),
        ((1, 0, 1, 1), (0, 1, 2, 3), (0, 0, 2, 3), (0, 0, 2, 3)),
        ((0, 0, 1, 0), (0, 1, 2, 3), (2, 2, 2, 2), (2, 2, 2, 2)),
        ((0, 0, 0, 0), (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)),
        ((1, 0.75, 0.25, 0), (0, 1, 2, 3), (0, 0, 0, 0), (0, 0, 1, 1)),
        ((0.8, 0.79, 0.9), (0, 1, 2), (0, 0, 2), (0, 1, 2)),
    ],
)
def test_places_go_to_those_that_show_the_ground(
    shares: tuple[float, ...], keep: tuple[int, ...], drop: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    assert choose(shares, "keep") == keep
    assert choose(shares, "drop") == drop
    assert choose(shares, "weight") == weight


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_all_places_are_taken_by_the_weights(shares: list[float]) -> None:
    for cloudy in ("keep", "drop", "weight"):
        chosen = choose(shares, cloudy)
        assert len(chosen) == len(shares)
        assert sorted(chosen) == list(chosen)
    dropped = choose(shares, "drop")
    if any(share >= 1 - MOST_HIDDEN for share in shares):
        assert all(shares[number] >= 1 - MOST_HIDDEN for number in dropped)
    total, weighted = sum(shares), choose(shares, "weight")
    if total > 0:
        assert all(
            abs(weighted.count(number) - len(shares) * share / total) < 1 + 1e-5 for number, share in enumerate(shares)
        )


def test_the_configuration_names_the_nearest_rule() -> None:
    assert load_config("demo", ["data.cloudy=drop"]).data.cloudy == "drop"
    with pytest.raises(UserError, match=r"data\.cloudy = 'drops' is not known; did you mean 'drop'"):
        load_config("demo", ["data.cloudy=drops"])
    with pytest.raises(UserError, match=r"data\.cloudy = 'drop' is out of range: it must be keep, since data"):
        DataConfig(cloudy="drop", simulate="sensor")
