"""Checks of a scene's values: units that cannot be reflectance, and counts of unusual values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sharding.errors import UnusableError
from sharding.sources.source import Scene

BRIGHTEST = 2.0
"""Median above which values cannot be reflectance: fresh snow has about 1, the brightest clouds below 2."""
DARKEST = 1e-3
"""98th percentile below which they cannot be either: even deep water reflects more in its brightest pixels."""
STRIDE = 8
"""Rows and columns between the pixels that are looked at."""
USUAL = 1e-4
"""Reflectance of a count in most products of surface reflectance."""
SCALES = (1e-3, 1 / 255, 1 / 1023, 1 / 2047, 1e-4, 1 / 65535)
"""Common factors from stored values to reflectance."""


def check_plausible(scene: Scene, chosen: Sequence[int]) -> None:
    """Refuse images whose values cannot be reflectance.

    Raises:
        UnusableError: ``implausible``, with the factor that would fit.
    """
    for title, image, valid in _images(scene, chosen):
        part = (..., slice(None, None, STRIDE), slice(None, None, STRIDE))
        values = image[part][:, valid[part]]
        if not values.size:
            continue
        middle, high = map(float, np.percentile(values, (50, 98)))
        if middle > BRIGHTEST:
            top = float(values.max())
            raise UnusableError(
                "implausible",
                f"half of {title} is above {middle:.5g}, which is no reflectance: a scale of "
                f"{fitting_scale(top, middle):.6g} would make it {middle * fitting_scale(top, middle):.3f}",
            )
        if middle < 0:
            raise UnusableError(
                "implausible",
                f"half of {title} is below 0 (median {middle:.3g}): an offset was subtracted twice, or too much",
            )
        if high < DARKEST:
            raise UnusableError(
                "implausible", f"98 % of {title} is below {DARKEST:g}, which is no reflectance: it was scaled twice"
            )


def unusual_values(scene: Scene, chosen: Sequence[int]) -> Mapping[str, object]:
    """Return counts of values that are negative or at the limit of their source's type, by image; none without any."""
    negative = {"lr": 0, "hr": 0, "pan": 0}
    for name, image, valid in _named(scene, chosen):
        if image.min() < 0:
            negative[name] += int(np.count_nonzero((image < 0) & valid))
    found = {"negative": {name: count for name, count in negative.items() if count}, **scene.counts}
    return {kind: dict(counts) for kind, counts in found.items() if counts}


def fitting_scale(top: float, middle: float) -> float:
    """Return the common factor that fits: the brightest value becomes about 1, or else the median a usual one."""
    for bits in (255, 1023, 2047, 65535):
        if top == bits:
            return 1 / bits
    if 0.01 < middle * USUAL < 1.5:
        return USUAL
    return min(SCALES, key=lambda scale: abs(np.log(middle * scale / 0.15)))


def _images(scene: Scene, chosen: Sequence[int]) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.bool_]]]:
    for index in chosen:
        yield f"revisit {scene.revisits[index].number}", scene.lr[index], scene.valid[index][0]
    yield scene.titles["hr"], scene.hr, scene.hr_valid
    yield scene.titles["pan"], scene.pan, scene.pan_valid


def _named(scene: Scene, chosen: Sequence[int]) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.bool_]]]:
    for (_, image, valid), name in zip(_images(scene, chosen), ["lr"] * len(chosen) + ["hr", "pan"], strict=True):
        yield name, image, valid
