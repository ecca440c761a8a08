"""Pixels of a user's images, in reflectance on a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.warp import reproject, transform
from rasterio.windows import Window

from sharding.errors import UnusableError
from sharding.sources.scenes.grid import Grid
from sharding.sources.scenes.header import MAX_BYTES, CloudMask, Header, Radiometry, opened

ALIGNED = 1e-3
"""Shift, in pixels, below which grids are taken as equal and pixels are copied."""
MARGIN = 4
"""Pixels beyond the grid that cubic interpolation may use."""
EDGE_POINTS = 21
"""Points of each edge that are transformed between coordinate systems."""
LOCAL = CRS.from_epsg(3857)
"""Stands for an unknown coordinate system that both rasters share."""

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]


def read_on_grid(header: Header, bands: Sequence[int], radiometry: Radiometry, grid: Grid) -> tuple[Image, int]:
    """Read bands of a raster on a grid, in reflectance.

    Pixels are copied if the grids agree, else interpolated (cubic, averaged where pixels shrink). Pixels without data
    in one band have none in all and take no part.

    Args:
        header: The raster; it has a georeference, see `Header.over`.
        bands: Numbers from 1.
        radiometry: Conversion to reflectance.
        grid: Grid of the result.

    Returns:
        [C, h, w] reflectance, NaN where there is no data, and the number of values read at the limit of their type.

    Raises:
        UnusableError: If it cannot be read.
    """
    image = np.full((len(bands), grid.height, grid.width), np.nan, np.float32)
    saturated = 0
    for zoom, places in header.zooms(bands).items():
        wanted = [bands[place] for place in places]
        image[places], count = _read_level(header.at(zoom), wanted, radiometry, grid)
        saturated += count
    image[:, np.isnan(image).any(axis=0)] = np.nan
    return image, saturated


def _read_level(header: Header, bands: Sequence[int], radiometry: Radiometry, grid: Grid) -> tuple[Image, int]:
    """Read bands whose pixels have one size on a grid."""
    box = window_of(header, grid)
    if box is None:
        return np.full((len(bands), grid.height, grid.width), np.nan, np.float32), 0
    image, saturated = _read(header, bands, radiometry, box)
    if np.isnan(image).all():
        return np.full((len(bands), grid.height, grid.width), np.nan, np.float32), saturated
    placed = _placed(header, image, box, grid, Resampling.cubic)
    # Cubic interpolation swings beyond bright and dark edges, to less than black.
    return np.clip(placed, np.nanmin(image), np.nanmax(image), out=placed), saturated


def read_mask(mask: CloudMask, grid: Grid, unknown: int) -> NDArray[np.uint8]:
    """Read a cloud mask [h, w] on a grid by the nearest pixel: 0 clear, 1 cloud, ``unknown`` also beyond the raster.

    Args:
        mask: The mask; it has a georeference, see `Header.over`.
        grid: Grid of the result.
        unknown: Value of pixels of which nothing is known.

    Raises:
        UnusableError: If it cannot be read, or holds other values than 0 to 255.
    """
    header = mask.header
    box = window_of(header, grid)
    if box is None:
        return np.full((grid.height, grid.width), unknown, np.uint8)
    image, _ = _read(header, mask.bands, Radiometry(1.0, 0.0, ()), box)
    if np.nanmin(image) < 0 or np.nanmax(image) > 255:
        raise UnusableError("wrong-type", f"{header.title} holds values beyond 0 to 255, which masks have")
    placed = _placed(header, image, box, grid, Resampling.nearest)
    silent = np.isnan(placed) | np.isin(placed, (*mask.unknown, unknown))
    found = np.where(silent.any(axis=0), unknown, 0).astype(np.uint8)
    found[(np.isin(placed, mask.cloud) & ~silent).any(axis=0)] = 1
    return found


def window_of(header: Header, grid: Grid) -> Window | None:
    """Return the pixels of a raster that a grid needs, with a margin; None if they do not meet."""
    xs, ys = to_crs(grid.crs, header.crs, *edge(grid.bounds))
    columns, rows = ~header.affine @ (np.array(xs), np.array(ys))
    if not (np.isfinite(columns).all() and np.isfinite(rows).all()):
        return None
    left, right = math.floor(columns.min() + ALIGNED), math.ceil(columns.max() - ALIGNED)
    top, bottom = math.floor(rows.min() + ALIGNED), math.ceil(rows.max() - ALIGNED)
    # Where pixels shrink, an interpolated pixel uses more of them.
    margin = MARGIN * max(1, math.ceil(max((right - left) / grid.width, (bottom - top) / grid.height)))
    left, top = max(0, left - margin), max(0, top - margin)
    right, bottom = min(header.width, right + margin), min(header.height, bottom + margin)
    return Window(left, top, right - left, bottom - top) if right > left and bottom > top else None


def edge(bounds: tuple[float, float, float, float]) -> tuple[list[float], list[float]]:
    """Return x and y of points on the edge of a rectangle: upper, right, lower, left."""
    west, south, east, north = bounds
    across = np.linspace(west, east, EDGE_POINTS)
    down = np.linspace(north, south, EDGE_POINTS)
    xs = [*across, *np.full(EDGE_POINTS, east), *across, *np.full(EDGE_POINTS, west)]
    ys = [*np.full(EDGE_POINTS, north), *down, *np.full(EDGE_POINTS, south), *down]
    return [float(x) for x in xs], [float(y) for y in ys]


def to_crs(
    source: str | None, target: str | None, xs: Sequence[float], ys: Sequence[float]
) -> tuple[Sequence[float], Sequence[float]]:
    """Transform points; they are unchanged between equal or unknown coordinate systems."""
    if source == target or source is None or target is None:
        return xs, ys
    x, y = transform(CRS.from_string(source), CRS.from_string(target), list(xs), list(ys))[:2]
    return x, y


def _read(header: Header, bands: Sequence[int], radiometry: Radiometry, box: Window) -> tuple[Image, int]:
    """Read a window in reflectance, NaN where there is no data, and count values at the limit of their type."""
    if box.width * box.height * len(bands) * 8 > MAX_BYTES:
        raise UnusableError(
            "absurd-size", f"{header.title} needs {box.width} x {box.height} px for one tile: give a smaller --tile"
        )
    image = np.full((len(bands), box.height, box.width), np.nan, np.float32)
    saturated = 0
    for piece in header.pieces:
        places = [place for place, band in enumerate(bands) if band in piece.bands]
        left, right = max(box.col_off, piece.column), min(box.col_off + box.width, piece.column + piece.width)
        top, bottom = max(box.row_off, piece.row), min(box.row_off + box.height, piece.row + piece.height)
        if not places or right <= left or bottom <= top:
            continue
        own = [piece.bands.index(bands[place]) + 1 for place in places]
        with opened(piece.file) as raster:
            window = Window(left - piece.column, top - piece.row, right - left, bottom - top)
            stored = raster.read(own, window=window)
        rows = slice(top - box.row_off, bottom - box.row_off)
        columns = slice(left - box.col_off, right - box.col_off)
        for place, values in zip(places, stored, strict=True):
            image[place, rows, columns], count = _reflectance(header, bands[place], radiometry, values)
            saturated += count
    image[:, ~np.isfinite(image).all(axis=0)] = np.nan
    return image, saturated


def _reflectance(header: Header, band: int, radiometry: Radiometry, stored: NDArray[Any]) -> tuple[Image, int]:
    """Return reflectance of a band's values, NaN where there is no data, and the number of saturated ones."""
    scale, offset, nodata = radiometry.of(header, band)
    image = stored.astype(np.float32)
    if (scale, offset) != (1.0, 0.0):
        image = np.asarray(stored * np.float64(scale) + offset, np.float32)
    most: float | None = header.saturated
    if most is None and stored.dtype.kind == "u":
        most = float(np.iinfo(stored.dtype).max)
    saturated = int(np.count_nonzero(stored >= most)) if most is not None and most != nodata else 0
    if nodata is not None and not math.isnan(nodata):
        image[_equals(stored, nodata)] = np.nan
    return image, saturated


def _equals(stored: NDArray[Any], value: float) -> Mask:
    """Return the mask of pixels with a value; of none if their type cannot hold it, such as -9999 in uint16."""
    if stored.dtype.kind in "ui":
        limits = np.iinfo(stored.dtype)
        if not (limits.min <= value <= limits.max and float(value).is_integer()):
            return np.zeros(stored.shape, np.bool_)
    return np.asarray(stored == np.asarray(value).astype(stored.dtype))


def _placed(header: Header, image: Image, box: Window, grid: Grid, resampling: Resampling) -> Image:
    """Return the pixels of a window on a grid."""
    place = header.affine @ Affine.translation(box.col_off, box.row_off)
    result = np.full((len(image), grid.height, grid.width), np.nan, np.float32)
    if header.crs == grid.crs and _aligned(place, grid):
        x, y = (round(value) for value in ~place @ (grid.west, grid.north))
        rows, columns = image.shape[-2:]
        top, left = max(0, y), max(0, x)
        bottom, right = min(rows, y + grid.height), min(columns, x + grid.width)
        if bottom > top and right > left:
            result[:, top - y : bottom - y, left - x : right - x] = image[:, top:bottom, left:right]
        return result
    reproject(
        image,
        result,
        src_transform=place,
        src_crs=header.crs or LOCAL,
        src_nodata=np.nan,
        dst_transform=Affine(*grid.transform),
        dst_crs=grid.crs or LOCAL,
        dst_nodata=np.nan,
        resampling=resampling,
        tolerance=0,  # the default is an eighth of a pixel
    )
    return result


def _aligned(place: Affine, grid: Grid) -> bool:
    same = np.allclose((place.a, -place.e), (grid.step_x, grid.step_y), rtol=1e-7, atol=0)
    if not same or place.b or place.d:
        return False
    x, y = ~place @ (grid.west, grid.north)
    return bool(abs(x - round(x)) < ALIGNED and abs(y - round(y)) < ALIGNED)
