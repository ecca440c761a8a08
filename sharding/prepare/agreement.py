"""Agreement of a sample's revisits with its target: whether they show the same land in the same colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sharding.format.entries import Content
from sharding.prepare.median import median_of

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

COARSER = 2
"""LR pixels along each side of a compared pixel: less noise, and less work."""
WHOLE = np.float32(0.99)
"""Share of a compared pixel that must be seen."""
LEAST_PIXELS = 16
"""Pixels that a comparison needs."""
DIGITS = 4


def agreement_of(
    lr: Array,
    clear: Mask,
    hr: Array,
    hr_valid: Mask,
    bands: tuple[Sequence[int], Sequence[int]],
    land: tuple[float, float, float, float] | None,
) -> Content:
    """Compare revisits with the target, both averaged over 2 x 2 LR pixels.

    Args:
        lr: Revisits [R, C, h, w], reflectance.
        clear: Mask [R, 1, h, w] of pixels with data and without cloud.
        hr: Target [C', H, W], reflectance.
        hr_valid: Mask [H, W] of its pixels with data.
        bands: Positions of the bands that are compared, in the revisits and in the target.
        land: Bounds in EPSG:4326.

    Returns:
        Correlation over pixels, the mean over bands, of each revisit and of the median of all; and the median absolute
        difference of that median, reflectance.
    """
    height, width = (max(1, side // COARSER) for side in lr.shape[-2:])
    size = height, width
    target = _averaged(hr, size)[list(bands[1])]
    seen = _averaged(hr_valid[None].astype(np.float32), size)[0] > WHOLE
    images = _averaged(lr, size)[:, list(bands[0])]
    usable: Mask = np.asarray(_averaged(clear.astype(np.float32), size) > WHOLE)
    middle = median_of(images, usable)
    known: Mask = seen & np.asarray(usable.any(axis=0))[0]
    distance = float(np.median(np.abs(middle - target)[:, known])) if known.sum() >= LEAST_PIXELS else None
    revisits = tuple(_correlation(image, target, seen & mask[0]) for image, mask in zip(images, usable, strict=True))
    return Content(
        correlation=_correlation(middle, target, known),
        distance=None if distance is None else round(distance, DIGITS),
        revisits=revisits,
        land=land,
    )


def _correlation(image: Array, target: Array, known: Mask) -> float | None:
    if known.sum() < LEAST_PIXELS:
        return None
    found = []
    for mine, theirs in zip(image[:, known].astype(np.float64), target[:, known].astype(np.float64), strict=True):
        a, b = mine - mine.mean(), theirs - theirs.mean()
        spread = float(np.sqrt((a @ a) * (b @ b)))
        if spread > 0:
            found.append(float(a @ b) / spread)
    return round(sum(found) / len(found), DIGITS) if found else None


def _averaged(image: Array, size: tuple[int, ...]) -> Array:
    """Return images [..., h, w] averaged to a size."""
    if image.shape[-2:] == (COARSER * size[0], COARSER * size[1]):  # the same sums, five times as fast
        first, second = image[..., ::COARSER, :], image[..., 1::COARSER, :]
        total = first[..., ::2] + first[..., 1::2] + second[..., ::2] + second[..., 1::2]
        return np.asarray(total * np.float32(1 / COARSER**2), np.float32)
    averaged = functional.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(image)), (size[0], size[1]))
    return np.asarray(averaged.numpy(), np.float32)
