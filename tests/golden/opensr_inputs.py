"""Inputs of the golden values of opensr-test, as formulas; numpy alone, for the package's own environment."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIDE = 24
"""Side of the low-resolution image, px."""
RATIOS = (2, 4)
METHODS = ("enlarged", "sharp", "invented")

Image = NDArray[np.float64]


def make_case(ratio: int) -> tuple[Image, Image, dict[str, Image]]:
    """Return the revisit [3, h, w], the target [3, H, W], and an image of the target's shape for each of METHODS."""
    rows, columns = np.meshgrid(*(np.arange(SIDE * ratio) / (SIDE * ratio),) * 2, indexing="ij")
    waves = [np.sin(2 * np.pi * (3 * rows + number * columns)) for number in (1, 2, 4)]
    fine = np.sin(2 * np.pi * 9.7 * rows) * np.cos(2 * np.pi * 8.3 * columns + rows)
    target = np.stack([0.3 + 0.08 * wave + 0.05 * fine + 0.02 * rows for wave in waves])
    lr = target.reshape(3, SIDE, ratio, SIDE, ratio).mean((2, 4)) + 0.01
    enlarged = lr.repeat(ratio, 1).repeat(ratio, 2)
    other = np.cos(2 * np.pi * 10.9 * columns) * np.cos(2 * np.pi * 7.1 * rows)
    images = (enlarged, 0.9 * target + 0.03 + 0.004 * other, enlarged + 0.05 * other)
    return lr, target, dict(zip(METHODS, images, strict=True))
