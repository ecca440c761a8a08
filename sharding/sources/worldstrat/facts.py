"""What a raster's own tags say of its bands, its pixels without data, and its place; WorldStrat's files say little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.warp import transform_bounds

from sharding.errors import UnusableError
from sharding.sources.bands import SYNONYMS, canonical, choose_bands
from sharding.sources.source import Bounds

_COLOURS = {ColorInterp.red: "red", ColorInterp.green: "green", ColorInterp.blue: "blue"}
KM_PER_DEGREE = 111.32
MOST_DEGREES = 1000.0


def bands_by_name(title: str, raster: DatasetReader, numbers: Sequence[int], names: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of bands: by their names if the raster names its bands, else the usual ones.

    Args:
        title: Name of the raster for messages.
        raster: The raster.
        numbers: Usual numbers, from 1.
        names: Names of these bands.

    Raises:
        UnusableError: ``wrong-bands``, if the raster names its bands and one is missing.
    """
    colours = [_COLOURS.get(kind) for kind in raster.colorinterp]
    own = [text or colour for text, colour in zip(raster.descriptions, colours, strict=True)]
    if not any(name and canonical(name) in SYNONYMS for name in own):
        return tuple(numbers)
    return choose_bands(title, own, None, names)[0]


def clear_nodata(raster: DatasetReader, image: NDArray[np.generic]) -> bool:
    """Set pixels of an image [C, h, w] to 0 that the raster's tag says hold no data; return whether there are any.

    A tag of 0 changes nothing: 0 means no data in WorldStrat.
    """
    nodata = raster.nodata
    if nodata is None or nodata == 0 or (image.dtype.kind in "iu" and not _holds(image.dtype, nodata)):
        return False
    missing = np.isnan(image) if math.isnan(nodata) else image == np.asarray(nodata).astype(image.dtype)
    if not missing.any():
        return False
    image[:, missing.any(axis=0)] = 0
    return True


def _holds(integers: np.dtype[Any], value: float) -> bool:
    limits = np.iinfo(integers)
    return value.is_integer() and limits.min <= value <= limits.max


def land_of(crs: str | None, bounds: Bounds) -> Bounds | None:
    """Return bounds in EPSG:4326, None without a coordinate system, or for coordinates that it does not have."""
    if crs is None:
        return None
    found = bounds if crs == "EPSG:4326" else _in_degrees(crs, bounds)
    return found if found and all(math.isfinite(value) and abs(value) <= MOST_DEGREES for value in found) else None


def _in_degrees(crs: str, bounds: Bounds) -> Bounds | None:
    try:
        west, south, east, north = transform_bounds(crs, "EPSG:4326", *bounds)
    except (CPLE_BaseError, RasterioError):
        return None
    return west, south, east, north


def check_place(title: str, raster: DatasetReader, crs: str | None, bounds: Bounds) -> None:
    """Compare a raster's georeference, if it has one, with the place of the scene.

    Raises:
        UnusableError: ``no-overlap``, with the distance.
    """
    if crs is None or raster.crs is None or raster.transform == Affine.identity():
        return
    mine, theirs = land_of(raster.crs.to_string(), tuple(raster.bounds)), land_of(crs, bounds)
    if mine is None or theirs is None:
        raise UnusableError("unreadable", f"{title} or a revisit has coordinates that no place on Earth has")
    (west, south, east, north), (left, bottom, right, top) = mine, theirs
    across, down = max(0.0, left - east, west - right), max(0.0, bottom - north, south - top)
    if across or down:
        wide = math.cos(math.radians((south + north) / 2))
        distance = KM_PER_DEGREE * math.hypot(across * wide, down)
        raise UnusableError("no-overlap", f"{title} lies {distance:.1f} km from the revisits")
