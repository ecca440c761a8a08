"""Procedural land: fields, woods, water, roads and villages at 1.5 m, as a satellite would see them.

Numbers are reflectances of red, green, blue and near infrared. All randomness comes from the given
generator, so a seed gives the same scene everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Typical surface reflectances: red, green, blue, near infrared.
CROPS = np.array(
    [
        [0.045, 0.075, 0.038, 0.40],  # dense crop
        [0.085, 0.105, 0.060, 0.31],  # young crop
        [0.210, 0.180, 0.120, 0.29],  # stubble
        [0.165, 0.130, 0.098, 0.22],  # bare soil
        [0.225, 0.150, 0.098, 0.26],  # red soil
        [0.075, 0.098, 0.050, 0.34],  # meadow
        [0.130, 0.135, 0.070, 0.33],  # ripening crop
    ],
    dtype=np.float32,
)
CROP_GREENNESS = np.array([1.0, 0.7, 0.1, 0.0, 0.0, 0.8, 0.5], dtype=np.float32)
FOREST = np.array([0.028, 0.048, 0.025, 0.30], dtype=np.float32)
WATER = np.array([0.030, 0.042, 0.046, 0.018], dtype=np.float32)
SAND = np.array([0.300, 0.260, 0.190, 0.36], dtype=np.float32)
ASPHALT = np.array([0.125, 0.122, 0.118, 0.16], dtype=np.float32)
DIRT = np.array([0.260, 0.215, 0.155, 0.30], dtype=np.float32)
ROOFS = np.array(
    [
        [0.29, 0.16, 0.115, 0.30],
        [0.38, 0.38, 0.39, 0.40],
        [0.20, 0.195, 0.19, 0.22],
        [0.31, 0.25, 0.19, 0.33],
    ],
    dtype=np.float32,
)
# Direction in which shadows fall, (rows, columns): the sun stands in the south-east at 10:30.
SHADOW = (-0.75, -0.66)


@dataclass(frozen=True)
class Land:
    """Land of one scene at full detail."""

    bands: Image
    """[4, S, S] reflectance of red, green, blue, near infrared."""

    greenness: Image
    """[S, S] strength of the seasons in a pixel, 0 to 1."""

    water: Mask
    """[S, S] mask of open water."""


def make_land(rng: np.random.Generator, side: int) -> Land:
    """Paint a scene of ``side`` x ``side`` pixels of 1.5 m."""
    canvas = _Canvas(rng, side)
    canvas.fields()
    canvas.woods()
    canvas.water_body()
    canvas.main_road()
    for _ in range(max(1, round(rng.integers(2, 5) * (side / 1054) ** 2))):
        canvas.village()
    canvas.trees()
    canvas.relief()
    return Land(np.clip(canvas.bands, 0.002, 1.5), canvas.greenness, canvas.water)


def fractal(rng: np.random.Generator, side: int, slope: float, coarsest: float = 1.0) -> Image:
    """Return [side, side] noise of mean 0 and deviation 1 whose amplitude falls as frequency ** -slope.

    Args:
        rng: Source of the noise.
        side: Side of the image, px.
        slope: Exponent; 1 is rough, 2 is smooth.
        coarsest: Longest wave, as a fraction of the side.
    """
    white = np.fft.rfft2(rng.standard_normal((side, side), dtype=np.float32))
    y, x = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    frequency = np.maximum(np.hypot(y, x), 1.0 / (side * coarsest))
    noise = np.fft.irfft2(white * frequency**-slope, s=(side, side)).astype(np.float32)
    noise -= noise.mean()
    return np.asarray(noise / noise.std(), dtype=np.float32)


class _Canvas:
    """Scene while it is painted."""

    def __init__(self, rng: np.random.Generator, side: int) -> None:
        self.rng, self.side = rng, side
        axis = np.arange(side, dtype=np.float32)
        self.y, self.x = np.meshgrid(axis, axis, indexing="ij")
        self.bands = np.zeros((4, side, side), np.float32)
        self.greenness = np.zeros((side, side), np.float32)
        self.water = np.zeros((side, side), np.bool_)
        self.angle = float(rng.uniform(0, np.pi))
        self.smooth = fractal(rng, side, 2.2)

    def fields(self) -> None:
        """Cover the land with strips of parcels, each with its crop, its rows and its borders."""
        rng = self.rng
        u, v = self._rotated(self.angle)
        u, v = u + 5 * self.smooth, v + 5 * np.roll(self.smooth, self.side // 3, axis=1)
        cuts = np.cumsum(rng.uniform(45, 150, 2 * self.side // 45)) - self.side
        strip = np.searchsorted(cuts, u)
        lengths = rng.uniform(70, 280, cuts.size + 1).astype(np.float32)
        along = (v + rng.uniform(0, 200, cuts.size + 1).astype(np.float32)[strip]) / lengths[strip]
        parcel = np.floor(along).astype(np.int64)
        parcel -= parcel.min()
        table = (cuts.size + 1, int(parcel.max()) + 1)
        crop = rng.choice(len(CROPS), table, p=rng.dirichlet(np.full(len(CROPS), 1.5)))[strip, parcel]
        rows = rng.uniform(0, 0.09, table)[strip, parcel] * np.sin(
            2 * np.pi * u / rng.uniform(4, 11, table)[strip, parcel]
        )
        tone = rng.normal(1, 0.1, table)[strip, parcel] + rows
        tone += 0.07 * fractal(rng, self.side, 1.0, 0.1) + 0.05 * self.smooth
        self.bands[:] = np.moveaxis(CROPS[crop], -1, 0) * tone.astype(np.float32)
        self.greenness[:] = CROP_GREENNESS[crop]
        edges = np.concatenate(([-np.inf], cuts, [np.inf]))
        to_strip = np.minimum(u - edges[strip], edges[strip + 1] - u)
        to_end = np.minimum(along - np.floor(along), np.ceil(along) - along) * lengths[strip]
        kind = rng.integers(0, 3, cuts.size + 1)[strip]
        self._paint((to_strip < 1.6) & (kind == 0), DIRT, 0.0)
        self._paint((np.minimum(to_strip, to_end) < 2.2) & (kind == 1), FOREST * 1.2, 0.9)

    def woods(self) -> None:
        """Grow woods where smooth noise is high, with crowns and the shadows between them."""
        rng = self.rng
        shape = fractal(rng, self.side, 1.9)
        mask = shape > rng.uniform(0.7, 1.8)
        crowns = fractal(rng, self.side, 0.6, 8 / self.side)
        lit = crowns - np.roll(crowns, (-2, -2), (0, 1))
        tone = np.clip(1 + 0.28 * crowns + 0.22 * lit, 0.25, 2.2)
        self.bands[:, mask] = (FOREST[:, None] * tone[mask]).astype(np.float32)
        self.greenness[mask] = 0.6

    def water_body(self) -> None:
        """Paint a river with sand banks, or a lake, or no water."""
        rng = self.rng
        choice = rng.random()
        if choice < 0.45:
            distance = self._to_curve(rng.uniform(0, np.pi), 0.09)
            width = rng.uniform(9, 26) * (1 + 0.25 * np.roll(self.smooth, self.side // 2, axis=0))
        elif choice < 0.7:
            distance = -60 * fractal(rng, self.side, 2.4)
            width = np.full_like(distance, -rng.uniform(70, 110))
        else:
            return
        self._paint(distance < width + 4, SAND * rng.uniform(0.6, 1.0), 0.0)
        self.water = np.asarray(distance < width)
        ripples = 1 + 0.04 * fractal(rng, self.side, 0.8, 0.05)
        self.bands[:, self.water] = (WATER[:, None] * ripples[self.water]).astype(np.float32)
        self.greenness[self.water] = 0

    def main_road(self) -> None:
        """Lay an asphalt road with pale verges from side to side."""
        distance = self._to_curve(self.rng.uniform(0, np.pi), 0.05)
        self._paint(distance < 5.2, DIRT * 0.8, 0.1)
        self._paint(distance < 3.2, ASPHALT * self.rng.uniform(0.8, 1.4), 0.0)

    def village(self) -> None:
        """Place streets and houses with their shadows around a centre."""
        rng = self.rng
        centre = rng.uniform(0.12, 0.88, 2) * self.side
        angle, radius = rng.uniform(0, np.pi / 2), rng.uniform(45, 130)
        near = np.hypot(self.y - centre[0], self.x - centre[1]) < radius * (1 + 0.25 * self.smooth)
        near &= ~self.water
        u, v = self._rotated(angle)
        self.bands[:, near] = self.bands[:, near] * 0.65 + 0.35 * DIRT[:, None] * 0.75
        street = (np.mod(u, 46) < 4.2) | (np.mod(v, 62) < 4.2)
        self._paint(near & street, ASPHALT, 0.0)
        houses = []
        for _ in range(int(radius**2 / 70)):
            place = centre + rng.normal(0, radius / 2.2, 2)
            inside = np.all((place > 20) & (place < self.side - 20))
            row, column = place.astype(int) if inside else (0, 0)
            if inside and near[row, column] and not street[row, column]:
                houses.append((row, column, rng.uniform(3, 7), rng.uniform(4, 11), rng.uniform(3, 9)))
        for row, column, depth, width, height in houses:
            for step in np.linspace(0, height, 5):
                self._house(row + SHADOW[0] * step, column + SHADOW[1] * step, depth, width, angle, None)
        for row, column, depth, width, _ in houses:
            roof = ROOFS[rng.choice(len(ROOFS), p=[0.5, 0.15, 0.2, 0.15])] * rng.uniform(0.75, 1.2)
            self._house(row, column, depth, width, angle, roof)

    def trees(self) -> None:
        """Scatter single trees with their shadows over the land."""
        for _ in range(int(220 * (self.side / 1054) ** 2)):
            row, column = self.rng.uniform(10, self.side - 10, 2)
            radius = self.rng.uniform(1.6, 4.0)
            if not self.water[int(row), int(column)]:
                self._disc(row + SHADOW[0] * 5, column + SHADOW[1] * 5, radius, None)
                self._disc(row, column, radius, FOREST * self.rng.uniform(0.8, 1.6))

    def relief(self) -> None:
        """Shade the slopes."""
        slope = self.smooth - np.roll(self.smooth, (3, 3), (0, 1))
        shade = 1 + 0.06 * slope / slope.std()
        self.bands *= np.where(self.water, 1, shade).astype(np.float32)

    def _rotated(self, angle: float) -> tuple[Image, Image]:
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return self.x * c + self.y * s, self.y * c - self.x * s

    def _to_curve(self, angle: float, bend: float) -> Image:
        """Return the distance in px to a winding line with this direction through the middle part."""
        along, across = self._rotated(angle)
        middle = across[self.side // 2, self.side // 2] + self.rng.uniform(-0.25, 0.25) * self.side
        line = np.zeros_like(along)
        for wave in (1, 2, 3):
            phase = self.rng.uniform(0, 2 * np.pi)
            line += bend * self.side / wave * np.sin(2 * np.pi * wave * along / self.side / 1.7 + phase)
        return np.asarray(np.abs(across - middle - line), dtype=np.float32)

    def _paint(self, mask: Mask, colour: NDArray[np.floating], greenness: float) -> None:
        self.bands[:, mask] = colour[:, None].astype(np.float32)
        self.greenness[mask] = greenness

    def _house(self, row: float, column: float, depth: float, width: float, angle: float, roof: Image | None) -> None:
        """Paint a gabled roof, or darken the ground in its shape where ``roof`` is None."""
        window, y, x = self._window(row, column, 14)
        u = x * np.cos(angle) + y * np.sin(angle)
        v = y * np.cos(angle) - x * np.sin(angle)
        mask = (np.abs(u) < width) & (np.abs(v) < depth)
        if roof is None:
            self._shade(window, mask)
            return
        patch = self.bands[:, *window]
        patch[:, mask] = roof[:, None] * np.where(v[mask] > 0, 1.2, 0.8).astype(np.float32)
        self.greenness[*window][mask] = 0

    def _disc(self, row: float, column: float, radius: float, crown: Image | None) -> None:
        window, y, x = self._window(row, column, 6)
        mask = y * y + x * x < radius * radius
        if crown is None:
            self._shade(window, mask)
            return
        tone = 1 + 0.25 * (x - y)[mask] / radius
        self.bands[:, *window][:, mask] = crown[:, None] * tone
        self.greenness[*window][mask] = 0.6

    def _shade(self, window: tuple[slice, slice], mask: Mask) -> None:
        """Darken to the light of the sky without sun; a second shading changes nothing."""
        patch = self.bands[:, *window]
        sky = np.array([0.040, 0.043, 0.045, 0.06], np.float32)[:, None]
        patch[:, mask] = np.minimum(patch[:, mask], sky)
        self.greenness[*window][mask] *= 0.5

    def _window(self, row: float, column: float, reach: int) -> tuple[tuple[slice, slice], Image, Image]:
        """Return a window around a place, and its pixels' coordinates relative to the place."""
        top, left = max(0, int(row) - reach), max(0, int(column) - reach)
        window = (slice(top, int(row) + reach + 1), slice(left, int(column) + reach + 1))
        return window, self.y[window] - np.float32(row), self.x[window] - np.float32(column)
