"""Windows of a scene on both grids, and the augmentation of a chip: pure functions.

A scene has nine chips, numbered 3 * column + row: windows of 50 x 50 LR pixels with stride 50, and the HR windows whose
start and size are round(x * scale), halves to even (156 x 156 at 3.125 HR pixels per LR pixel).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.order import random_words
from sharding.format.layout import WORLDSTRAT_CHIPS, ChipGrid

Stored = npt.NDArray[Any]
Memory = npt.NDArray[np.uint8]


class Window(NamedTuple):
    """A square window of a scene on both grids, in pixels."""

    x: int
    """First LR column."""
    y: int
    """First LR row."""
    size: int
    """LR side."""
    hr_x: int
    """First HR column."""
    hr_y: int
    """First HR row."""
    hr_size: int
    """HR side."""


class Variant(NamedTuple):
    """Crop and augmentation of one chip in training."""

    window: Window
    """Crop window."""
    quarter_turns: int
    """Counter-clockwise quarter turns, 0 to 3."""
    flip: bool
    """True if rows are reversed, after the turn."""
    revisit: int
    """The revisit that a head without encoder is given, 0-based."""


@dataclass(frozen=True)
class ChipLayout:
    """Shapes of a dataset's chips and the layout of one chip in memory: revisits, target, PAN, in this order.

    A mask of pixels with data follows if the dataset stores one, in the same data type.
    """

    lr: tuple[int, int, int, int]
    """Revisits, bands, rows, columns."""
    hr: tuple[int, int, int]
    """Bands, rows, columns of the target; PAN has the same rows and columns."""
    dtype: torch.dtype
    """Data type of the stored images."""
    unit: float
    """Reflectance of a stored step."""
    offset: float = 0.0
    """Reflectance of a stored 0."""
    native: bool = False
    """True if samples differ in the ratio of their grids: an HR window is then placed by the sample's own ratio."""
    revisits: int = 0
    """Revisits to simulate; 0 for as many as are stored."""
    valid: bool = False
    """True if samples have a mask of pixels with data (`sharding.format.layout.VALID`)."""

    @cached_property
    def _parts(self) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """Return first byte, end byte and shape of each image."""
        parts, start = [], 0
        mask = (1, *self.hr[1:])
        for shape in (self.lr, self.hr, mask, *([mask] if self.valid else [])):
            stop = start + math.prod(shape) * self.dtype.itemsize
            parts.append((start, stop, shape))
            start = stop
        return tuple(parts)

    @property
    def chip_bytes(self) -> int:
        """Return the bytes of a chip."""
        return self._parts[-1][1]

    @cached_property
    def record(self) -> np.dtype[np.void]:
        """Return the type of a chip in memory, with a field for each image."""
        values = torch.empty(0, dtype=self.dtype).numpy().dtype
        return np.dtype([(f"image{number}", values, shape) for number, (*_, shape) in enumerate(self._parts)])

    def tensors(self, memory: Tensor) -> list[Tensor]:
        """Return LR [N, R, C, h, w], HR [N, C, H, W] and PAN [N, 1, H, W] of chips, views of uint8 [N, chip_bytes].

        The mask of pixels with data [N, 1, H, W], 1 or 0, follows if there is one.
        """
        return [memory[:, start:stop].view(self.dtype).view(-1, *shape) for start, stop, shape in self._parts]


class StoredChips:
    """Stored chips, one after the other in one block of memory."""

    def __init__(self, layout: ChipLayout, rows: Memory) -> None:
        """Wrap uint8 memory [N, chip_bytes].

        A few views by numpy, because torch's cost five times as much: this runs for each scene, after copies that
        took the interpreter out of the processor's cache.
        """
        self.rows = rows
        """[N, chip_bytes], each chip as bytes."""
        self._native = layout.native
        records = rows.view(layout.record)[:, 0]
        self.images: list[Stored] = [records[name] for name in layout.record.names or ()]
        """LR [N, R, C, h, w], HR [N, C, H, W], PAN [N, 1, H, W] and the mask if there is one, views of the rows."""

    def crop(self, slot: int, scene: Sequence[Stored], window: Window, revisits: Sequence[int] | None = None) -> None:
        """Copy a window of a scene's LR, HR, PAN and mask; ``revisits`` are taken in place of all in their order."""
        if self._native:
            window = centred(window, scene[0].shape[-2:], scene[1].shape[-2:])
        x, y, size, hr_x, hr_y, hr_size = window
        stored = scene[0][:, :, y : y + size, x : x + size]
        self.images[0][slot] = stored if revisits is None else stored[list(revisits)]
        for image, whole in zip(self.images[1:], scene[1:], strict=True):
            image[slot] = whole[:, hr_y : hr_y + hr_size, hr_x : hr_x + hr_size]


def chip_window(chip: int, scale: float, grid: ChipGrid = WORLDSTRAT_CHIPS) -> Window:
    """Return the window of a chip of a scene whose HR grid has ``scale`` pixels per LR pixel."""
    column, row = divmod(chip % grid.count, grid.rows)
    return make_window(column * grid.stride, row * grid.stride, scale, grid.size)


def make_window(x: int, y: int, scale: float, size: int = WORLDSTRAT_CHIPS.size) -> Window:
    """Return the window of ``size`` LR pixels a side whose first LR pixel is (x, y)."""
    return Window(x, y, size, round(x * scale), round(y * scale), round(size * scale))


def centred(window: Window, lr: Sequence[int], hr: Sequence[int]) -> Window:
    """Return a window whose HR part has the same middle as its LR part in a scene of these (rows, columns)."""
    middle_x, middle_y = (start + window.size / 2 for start in (window.x, window.y))
    hr_x = round(middle_x * hr[1] / lr[1] - window.hr_size / 2)
    hr_y = round(middle_y * hr[0] / lr[0] - window.hr_size / 2)
    return window._replace(
        hr_x=max(0, min(hr_x, hr[1] - window.hr_size)), hr_y=max(0, min(hr_y, hr[0] - window.hr_size))
    )


def training_draws(num_chips: int, seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    """Return the random words [num_chips, 5] of an epoch's variants; a chip's are a function of (seed, epoch, chip)."""
    return random_words(5 * num_chips, seed, epoch, "variant").reshape(num_chips, 5)


def training_variant(
    chip: int,
    draws: npt.NDArray[np.uint64],
    *,
    lr_size: tuple[int, int],
    scale: float,
    revisits: int,
    windows: bool,
    turns: bool,
    grid: ChipGrid = WORLDSTRAT_CHIPS,
) -> Variant:
    """Return the training variant of ``chip``.

    Args:
        chip: Chip number, chips of a scene * sample + window.
        draws: [5] random words of the chip in this epoch, see `training_draws`.
        lr_size: Rows and columns of the LR grid that all scenes have, pixels.
        scale: HR pixels per LR pixel.
        revisits: Revisits of a scene.
        windows: Replace the chip's window by a random one of the scene.
        turns: Rotate by a random quarter turn, then flip with probability 1/2.
        grid: Chips of a scene.
    """
    x, y, turn, flip, revisit = draws.tolist()
    if windows:
        rows, columns = lr_size
        window = make_window(x % (columns - grid.size + 1), y % (rows - grid.size + 1), scale, grid.size)
        # If start and size are both rounded up, the last window would reach a pixel beyond the scene.
        last_y, last_x = (round(side * scale) - window.hr_size for side in lr_size)
        window = window._replace(hr_x=min(window.hr_x, last_x), hr_y=min(window.hr_y, last_y))
    else:
        window = chip_window(chip, scale, grid)
    return Variant(window, turn % 4 if turns else 0, turns and flip % 2 == 1, revisit % revisits)


def turn_and_flip(image: Tensor, quarter_turns: int, flip: bool) -> Tensor:
    """Rotate ``image`` [..., H, W] counter-clockwise by quarter turns, then reverse its rows if ``flip``."""
    turned = torch.rot90(image, quarter_turns, dims=(-2, -1))
    return torch.flip(turned, dims=(-2,)) if flip else turned
