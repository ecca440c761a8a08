"""Median over revisits, of the pixels that each shows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def median_of(lr: Array, usable: NDArray[np.bool_]) -> Array:
    """Return the per-pixel median [C, h, w] of usable revisits; 0 where no revisit is usable.

    It is a sorting network of whole images: the few values of a pixel lie far apart in memory, and numpy's median
    with gaps takes twenty times as long.
    """
    ordered: Array = np.where(usable, lr, np.float32(np.inf))
    least = np.empty_like(ordered[0])
    for turn in range(len(ordered)):
        for left in range(turn % 2, len(ordered) - 1, 2):
            low, high = ordered[left], ordered[left + 1]
            np.minimum(low, high, out=least)
            np.maximum(low, high, out=high)
            low[:] = least
    count = usable.sum(axis=0)
    median: Array = np.zeros_like(least)
    for number in range(1, len(ordered) + 1):
        here = count == number
        if here.any():
            middle = (ordered[(number - 1) // 2] + ordered[number // 2]) / 2
            np.copyto(median, middle, where=here)
    return median
