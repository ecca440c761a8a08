"""Windows of a scene and their weights: pure functions of sizes.

A scene of any size is covered by windows of the training chip's size. Neighbours overlap by half. Along each axis a
window's weight is 0 in a frame that is discarded, then rises as a raised cosine; the weights of all windows sum to 1
at every pixel. The outermost windows count fully up to the edge of the scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FRAME = 1 / 8
"""Discarded frame of a window, as a part of its side: there the network sees its own padding instead of land."""

LEAST = 1e-9
"""Weight of the frame: nothing beside another window's, but all where windows of few pixels are only frame."""


@dataclass(frozen=True)
class AxisWindow:
    """A window along one axis of a scene."""

    lr_start: int
    """First LR pixel."""
    lr_size: int
    """LR pixels."""
    hr_start: int
    """First HR pixel."""
    weights: NDArray[np.float32]
    """Weight of each of its HR pixels."""

    @property
    def lr_stop(self) -> int:
        """Return the LR pixel after the last."""
        return self.lr_start + self.lr_size

    @property
    def hr_stop(self) -> int:
        """Return the HR pixel after the last."""
        return self.hr_start + len(self.weights)


def window_starts(length: int, size: int, offset: int = 0) -> list[int]:
    """Return the first pixels of windows that cover ``length`` pixels, half a window apart.

    The first one begins at 0 and the last one ends at ``length``.

    Args:
        length: Pixels to cover, at least ``size``.
        size: Side of a window, pixels.
        offset: Start of the grid of windows, pixels; the result does not have to depend on it.
    """
    stride = max(1, size // 2)
    inner = range(offset % stride, length - size + 1, stride)
    return sorted({0, *inner, length - size})


def plan_axis(lr_length: int, hr_length: int, size: int, offset: int = 0) -> list[AxisWindow]:
    """Return the windows along one axis.

    Starts and sizes on the HR grid are rounded like those of the training's chips: round(x * scale), halves to even.

    Args:
        lr_length: LR pixels of the scene, at least ``size``.
        hr_length: HR pixels of the scene.
        size: LR pixels of a window.
        offset: Start of the grid of windows, LR pixels.

    Returns:
        The windows in order; their weights sum to 1 at every HR pixel.
    """
    scale = hr_length / lr_length
    hr_size = round(size * scale)
    lr_starts = window_starts(lr_length, size, offset)
    # If start and size are both rounded up, the last window would reach a pixel beyond the scene.
    hr_starts = [min(round(start * scale), hr_length - hr_size) for start in lr_starts]
    hr_starts[-1] = hr_length - hr_size
    total = np.zeros(hr_length)
    raw = []
    for number, start in enumerate(hr_starts):
        weights = _ramp(hr_size, rises=number > 0, falls=number < len(hr_starts) - 1)
        total[start : start + hr_size] += weights
        raw.append(weights)
    return [
        AxisWindow(lr_start, size, start, (weights / total[start : start + hr_size]).astype(np.float32))
        for lr_start, start, weights in zip(lr_starts, hr_starts, raw, strict=True)
    ]


def _ramp(size: int, *, rises: bool, falls: bool) -> NDArray[np.float64]:
    """Return the weights along a window: least in the frame, then a raised cosine, 1 on a side at the scene's edge."""
    position = (np.arange(size) + 0.5) / size
    way = np.clip((position - FRAME) / (0.5 - 2 * FRAME), 0.0, 1.0)
    rise = np.maximum(0.5 - 0.5 * np.cos(np.pi * way), LEAST)
    weights = np.ones(size)
    if rises:
        weights *= rise
    if falls:
        weights *= rise[::-1]
    return weights
