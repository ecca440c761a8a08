"""Choice of a chip's revisits by their clouds: pure functions of the stored images and cloud masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Cloudy = Literal["keep", "drop", "weight"]
CLOUDY: tuple[Cloudy, ...] = ("keep", "drop", "weight")

MOST_HIDDEN = 0.2
"""Share of a chip's pixels that a revisit may hide and is not dropped."""

_CLOUD = 1
"""Value of a cloud in a cloud mask; where nothing is known (255) the ground is taken as seen."""


def clear_shares(lr: npt.NDArray[Any], clm: npt.NDArray[np.uint8]) -> list[float]:
    """Return the share of pixels of each revisit that show the ground: with data, and without cloud.

    Args:
        lr: Revisits [R, C, h, w] as stored; pixels without data are 0 in all bands.
        clm: Cloud masks [R, 1, h, w].
    """
    seen = (lr != 0).any(axis=1) & (clm[:, 0] != _CLOUD)
    return [float(share) for share in seen.mean(axis=(1, 2))]


def choose(shares: Sequence[float], cloudy: Cloudy) -> tuple[int, ...]:
    """Return the revisits that a chip takes the places of its own by, as many as there are, ascending.

    With ``drop`` the revisits that hide at most `MOST_HIDDEN` share the places evenly, with ``weight`` all do in
    proportion to what they show (largest remainder, ties to the lower number). Without any clear one all are kept.

    Args:
        shares: Share of pixels that show the ground, for each revisit.
        cloudy: Rule; ``keep`` takes each revisit once.
    """
    weights = list(shares)
    if cloudy == "drop":
        weights = [float(share >= 1 - MOST_HIDDEN) for share in shares]
    total = sum(weights)
    if cloudy == "keep" or total == 0:
        return tuple(range(len(shares)))
    quotas = [len(weights) * weight / total for weight in weights]
    # Rounded, so that equal weights get equal quotas whatever the order of the sum.
    counts = [int(round(quota, 6)) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda number: (round(counts[number] - quotas[number], 6), number))
    for number in by_remainder[: len(weights) - sum(counts)]:
        counts[number] += 1
    return tuple(number for number, count in enumerate(counts) for _ in range(count))
