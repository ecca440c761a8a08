"""Rasters of a user: their headers, and their pixels in reflectance on a grid."""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.session import DummySession
from rasterio.transform import Affine
from rasterio.warp import reproject, transform
from rasterio.windows import Window

from sharding.errors import UnusableError
from sharding.sources.scenes.grid import Affine6, Grid
from sharding.sources.scenes.layout import File, as_date

MAX_BYTES = 1 << 31
"""Size limit of one block, and of the pixels that are read for one tile, bytes."""
DRIVERS = {".tif": "GTiff", ".tiff": "GTiff", ".jp2": "JP2OpenJPEG"}
"""Formats by the end of a file's name. Others are refused: some formats of GDAL refer to further files or addresses."""
ALIGNED = 1e-3
"""Shift, in pixels, below which grids are taken as equal and pixels are copied."""
MARGIN = 4
"""Pixels beyond the grid that cubic interpolation may use."""
EDGE_POINTS = 21
"""Points of each edge that are transformed between coordinate systems."""
LOCAL = CRS.from_epsg(3857)
"""Stands for an unknown coordinate system that both rasters share."""

_COLOURS = {ColorInterp.red: "red", ColorInterp.green: "green", ColorInterp.blue: "blue"}

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Header:
    """Header of a raster."""

    file: File
    """The file."""

    width: int
    """Columns."""

    height: int
    """Rows."""

    dtype: str
    """Type of the values."""

    names: tuple[str | None, ...]
    """Name of each band by the file; None where it has none."""

    nodata: tuple[float | None, ...]
    """Value without data of each band; None without one."""

    scales: tuple[float, ...]
    """Scale of each band."""

    offsets: tuple[float, ...]
    """Offset of each band."""

    crs: str | None
    """Coordinate system; None if unknown."""

    transform: Affine6 | None
    """Transform from pixel to CRS; None without a georeference."""

    date: str | None
    """Day of acquisition by the file."""

    @property
    def title(self) -> str:
        """Name for messages."""
        return self.file.name

    @property
    def affine(self) -> Affine:
        """Transform as a matrix; only of a raster with a georeference."""
        assert self.transform is not None
        return Affine(*self.transform)

    @property
    def is_north_up(self) -> bool:
        """True if rows run east and columns run south."""
        if self.transform is None:
            return False
        a, b, _, d, e, _ = self.transform
        return a > 0 and e < 0 and b == 0 and d == 0

    def over(self, grid: Grid) -> Header:
        """Return a header without georeference as one that covers a grid's land."""
        if self.transform is not None:
            return self
        step_x, step_y = grid.step_x * grid.width / self.width, grid.step_y * grid.height / self.height
        placed: Affine6 = (step_x, 0.0, grid.west, 0.0, -step_y, grid.north)
        return Header(**{**vars(self), "crs": grid.crs, "transform": placed})


@dataclass(frozen=True)
class Radiometry:
    """Conversion of a raster's values to reflectance: value x scale + offset, except of values without data."""

    scale: float | None = None
    """None takes the file's."""
    offset: float | None = None
    """None takes the file's."""
    nodata: tuple[float, ...] | None = None
    """One for all bands, or one per band of the file; empty for none, None takes the file's."""

    def of(self, header: Header, band: int) -> tuple[float, float, float | None]:
        """Return scale, offset and value without data of a band, numbered from 1."""
        place = band - 1
        values = header.nodata if self.nodata is None else self.nodata or (None,)
        nodata = values[0] if len(values) == 1 else values[place]
        scale = header.scales[place] if self.scale is None else self.scale
        return scale, header.offsets[place] if self.offset is None else self.offset, nodata


@contextlib.contextmanager
def gdal() -> Iterator[None]:
    """Configure GDAL: no look at neighbouring files, no network, no warning about rasters without georeference."""
    options = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_CACHEMAX": 256, "GDAL_PAM_ENABLED": "NO"}
    with warnings.catch_warnings(), rasterio.Env(DummySession(), **options):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def read_header(file: File) -> Header:
    """Read the header of a raster.

    Raises:
        UnusableError: If it is no raster of the known formats, of absurd size, or placed only by ground control points
            or RPCs.
    """
    with _opened(file) as raster:
        largest = max(height * width for height, width in raster.block_shapes) * max(map(_item_size, raster.dtypes))
        if largest * raster.count > MAX_BYTES:
            raise UnusableError("absurd-size", f"{file.name} has blocks of {largest} bytes, the most is {MAX_BYTES}")
        if any(np.dtype(dtype).kind not in "uif" for dtype in raster.dtypes):
            raise UnusableError("wrong-type", f"{file.name} holds {raster.dtypes[0]}, images are real numbers")
        found = None if raster.transform == Affine.identity() else tuple(raster.transform)[:6]
        if found is None and (raster.gcps[0] or raster.rpcs is not None):
            raise UnusableError(
                "no-georeference",
                f"{file.name} is placed by ground control points or RPCs only: orthorectify it, for example with "
                "`gdalwarp`",
            )
        colours = [_COLOURS.get(kind) for kind in raster.colorinterp]
        return Header(
            file=file,
            width=raster.width,
            height=raster.height,
            dtype=str(raster.dtypes[0]),
            names=tuple(text or colour for text, colour in zip(raster.descriptions, colours, strict=True)),
            nodata=tuple(raster.nodatavals),
            scales=tuple(raster.scales),
            offsets=tuple(raster.offsets),
            crs=_crs(raster) if found is not None else None,
            transform=found,
            date=as_date(raster.tags().get("TIFFTAG_DATETIME")),
        )


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
    box = window_of(header, grid)
    if box is None:
        return np.full((len(bands), grid.height, grid.width), np.nan, np.float32), 0
    image, saturated = _read(header, bands, radiometry, box)
    if np.isnan(image).all():
        return np.full((len(bands), grid.height, grid.width), np.nan, np.float32), saturated
    placed = _placed(header, image, box, grid, Resampling.cubic)
    # Cubic interpolation swings beyond bright and dark edges, to less than black.
    return np.clip(placed, np.nanmin(image), np.nanmax(image), out=placed), saturated


def read_mask(header: Header, grid: Grid, unknown: int) -> NDArray[np.uint8]:
    """Read a mask [h, w] on a grid by the nearest pixel; ``unknown`` beyond the raster.

    Raises:
        UnusableError: If it cannot be read, or holds other values than 0 to 255.
    """
    box = window_of(header, grid)
    if box is None:
        return np.full((grid.height, grid.width), unknown, np.uint8)
    image, _ = _read(header, (1,), Radiometry(1.0, 0.0, ()), box)
    if np.nanmin(image) < 0 or np.nanmax(image) > 255:
        raise UnusableError("wrong-type", f"{header.title} holds values beyond 0 to 255, which masks have")
    return np.asarray(np.nan_to_num(_placed(header, image, box, grid, Resampling.nearest)[0], nan=unknown), np.uint8)


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


def digest(file: File) -> str:
    """Return the SHA-256 of a file, in hex; each process computes it once."""
    status = file.path.stat()
    return _digest(file.path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _opened(file: File) -> Iterator[DatasetReader]:
    driver = DRIVERS.get(file.path.suffix.lower())
    if driver is None:
        raise UnusableError("unreadable", f"{file.name} is no {', '.join(DRIVERS)} file")
    try:
        with gdal(), rasterio.open(file.path, driver=driver) as raster:
            yield raster
    except (RasterioError, ValueError, MemoryError) as error:
        raise UnusableError("unreadable", f"{file.name} is damaged or truncated ({error})") from error


def _crs(raster: DatasetReader) -> str | None:
    if raster.crs is None:
        return None
    try:
        code = raster.crs.to_epsg()
        return f"EPSG:{code}" if code else str(raster.crs.to_wkt())
    except CRSError:
        return None


def _item_size(dtype: str) -> int:
    return np.dtype(dtype).itemsize


def _read(header: Header, bands: Sequence[int], radiometry: Radiometry, box: Window) -> tuple[Image, int]:
    """Read a window in reflectance, NaN where there is no data, and count values at the limit of their type."""
    if box.width * box.height * len(bands) * 8 > MAX_BYTES:
        raise UnusableError(
            "absurd-size", f"{header.title} needs {box.width} x {box.height} px for one tile: give a smaller --tile"
        )
    with _opened(header.file) as raster:
        stored = raster.read(list(bands), window=box)
    image = stored.astype(np.float32)
    missing = ~np.isfinite(image)
    most = np.iinfo(stored.dtype).max if stored.dtype.kind == "u" else None
    saturated = 0
    for place, band in enumerate(bands):
        scale, offset, nodata = radiometry.of(header, band)
        if nodata is not None and not math.isnan(nodata):
            missing[place] |= _equals(stored[place], nodata)
        if most is not None and most != nodata:
            saturated += int(np.count_nonzero(stored[place] == most))
        if (scale, offset) != (1.0, 0.0):
            image[place] = stored[place] * np.float64(scale) + offset
    image[:, missing.any(axis=0)] = np.nan
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
