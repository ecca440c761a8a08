"""Grids of pixels on land, and tiles of them: pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

Affine6 = tuple[float, float, float, float, float, float]
"""Transform (a, b, c, d, e, f) from pixel to CRS: x = a column + b row + c, y = d column + e row + f."""

RATIO_TOLERANCE = 0.004
"""Relative difference of a ratio to a fraction that is taken for it: UTM zones scale lengths by up to this."""
MAX_DENOMINATOR = 16


class Box(NamedTuple):
    """A rectangle of pixels."""

    x: int
    """First column."""
    y: int
    """First row."""
    width: int
    """Columns."""
    height: int
    """Rows."""


@dataclass(frozen=True)
class Grid:
    """A north-up grid of pixels in a coordinate system."""

    crs: str | None
    """Coordinate system, as EPSG code or WKT; None if unknown."""

    west: float
    """Left edge."""
    north: float
    """Upper edge."""
    step_x: float
    """Width of a pixel."""
    step_y: float
    """Height of a pixel, positive."""
    width: int
    """Columns."""
    height: int
    """Rows."""

    @property
    def transform(self) -> Affine6:
        """Transform from pixel to CRS."""
        return (self.step_x, 0.0, self.west, 0.0, -self.step_y, self.north)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north."""
        return (
            self.west,
            self.north - self.height * self.step_y,
            self.west + self.width * self.step_x,
            self.north,
        )

    def part(self, box: Box) -> Grid:
        """Return the grid of a box of pixels."""
        return Grid(
            self.crs,
            self.west + box.x * self.step_x,
            self.north - box.y * self.step_y,
            self.step_x,
            self.step_y,
            box.width,
            box.height,
        )

    def coarser(self, ratio: Fraction) -> Grid:
        """Return the grid of the same land with pixels ``ratio`` times as large; sides must be multiples of it."""
        width, height = self.width / ratio, self.height / ratio
        assert width.denominator == height.denominator == 1, "tiles have whole pixels on both grids"
        step_x, step_y = self.step_x * float(ratio), self.step_y * float(ratio)
        return Grid(self.crs, self.west, self.north, step_x, step_y, int(width), int(height))


def nice_ratio(measured: float) -> Fraction | None:
    """Return the simplest fraction near a measured ratio of pixel sizes, such as 20/3 for 6.668; None if none is."""
    for denominator in range(1, MAX_DENOMINATOR + 1):
        numerator = round(measured * denominator)
        if numerator and abs(measured * denominator / numerator - 1) <= RATIO_TOLERANCE:
            return Fraction(numerator, denominator)
    return None


def tiles(
    area: Box, side: int, overlap: int, ratio: Fraction, anchor: tuple[float, float], *, apart: bool = False
) -> Iterator[Box]:
    """Yield the tiles of an area of PAN pixels, row by row; each has whole pixels on both grids.

    An area shorter than a tile is one tile of what fits. A remainder of half a tile or more gets a tile that is moved
    back to the edge; a smaller one is left out.

    Args:
        area: Area that all images cover.
        side: Side of a tile in PAN pixels, a multiple of the ratio's numerator.
        overlap: Pixels that neighbours share, such a multiple too.
        ratio: PAN pixels per LR pixel.
        anchor: Column and row, in PAN pixels, of a corner of the revisits' own pixels: tiles begin as near to these
            corners as whole PAN pixels allow.
        apart: Leave every remainder out, so that no two tiles overlap.
    """
    rows = list(_stretches(area.y, area.height, side, overlap, ratio, anchor[1], apart))
    columns = list(_stretches(area.x, area.width, side, overlap, ratio, anchor[0], apart))
    for y, height in rows:
        for x, width in columns:
            yield Box(x, y, width, height)


def _stretches(
    start: int, length: int, side: int, overlap: int, ratio: Fraction, anchor: float, apart: bool
) -> Iterator[tuple[int, int]]:
    """Yield (first, length) of the tiles along one axis."""
    unit = ratio.numerator
    first = min(range(start, start + unit), key=lambda place: (_off(place - anchor, ratio), place))
    usable = (start + length - first) // unit * unit
    if usable <= 0:
        return
    if usable <= side:
        yield first, usable
        return
    stride = side - overlap
    count = (usable - side) // stride + 1
    for number in range(count):
        yield first + number * stride, side
    rest = usable - (side + (count - 1) * stride)
    if 2 * rest >= side and not apart:
        yield first + usable - side, side


def _off(distance: float, ratio: Fraction) -> float:
    """Return the distance in LR pixels to the nearest corner of one, without the rounding of equal ones."""
    pixels = distance / float(ratio)
    return round(abs(pixels - math.floor(pixels + 0.5)), 6)
