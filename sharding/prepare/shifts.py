"""Shifts between the revisits of a sample, by phase correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEAST_PEAK = 6.0
"""Height of the correlation's peak, in standard deviations of noise, below which two images have no common shift."""


def revisit_shifts(lr: NDArray[np.generic], rgb: Sequence[int]) -> list[tuple[float, float] | None]:
    """Return the shift of each revisit against the median of the others, down and right, in LR pixels.

    Args:
        lr: Revisits [R, C, h, w].
        rgb: Positions of the bands whose mean is compared.

    Returns:
        A shift per revisit; None for a single revisit, or where nothing correlates, such as under clouds.
    """
    grey = np.asarray(lr, np.float64)[:, list(rgb)].mean(axis=1)
    if len(grey) < 2:
        return [None] * len(grey)
    found = []
    for number, image in enumerate(grey):
        others = np.median(np.delete(grey, number, axis=0), axis=0)
        found.append(shift_between(image, others))
    return found


def shift_between(image: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return the shift of one image [h, w] against another, down and right, px; None where nothing correlates.

    The peak of the phase correlation (Kuglin and Hines, "The phase correlation image alignment method", 1975) is placed
    between pixels by the ratio of its neighbours (Foroosh, Zerubia, Berthod, IEEE TIP 11(3), 2002).
    """
    window = np.hanning(image.shape[0])[:, None] * np.hanning(image.shape[1])
    a, b = (np.fft.fft2((picture - picture.mean()) * window) for picture in (image, other))
    cross = a * b.conj()
    surface = np.fft.ifft2(cross / np.maximum(np.abs(cross), 1e-12)).real
    row, column = np.unravel_index(surface.argmax(), surface.shape)
    if surface[row, column] * np.sqrt(surface.size) < LEAST_PEAK:
        return None
    return (
        _between(surface[:, column], int(row)),
        _between(surface[row], int(column)),
    )


def _between(values: NDArray[np.float64], peak: int) -> float:
    """Return the place of a peak of a periodic line, between its pixels, from minus half its length on."""
    before, after = values[peak - 1], values[(peak + 1) % len(values)]
    side = 1 if after > before else -1
    neighbour = max(before, after, 0.0)
    place = peak + side * neighbour / (neighbour + values[peak])
    return float(place - len(values) if place > len(values) / 2 else place)
