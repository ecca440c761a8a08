"""Headers of a user's images: of one raster, or of a product whose bands and parts are files of their own."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.session import DummySession
from rasterio.transform import Affine

from sharding.errors import UnusableError
from sharding.sources.scenes.grid import Affine6, Grid
from sharding.sources.scenes.layout import File, as_date

MAX_BYTES = 1 << 31
"""Size limit of one block, and of the pixels that are read for one tile, bytes."""
DRIVERS = {".tif": "GTiff", ".tiff": "GTiff", ".jp2": "JP2OpenJPEG"}
"""Formats by the end of a file's name. Others are refused: some formats of GDAL refer to further files or addresses."""
LOCAL = CRS.from_epsg(3857)
"""Stands for an unknown coordinate system that both rasters share."""

_COLOURS = {ColorInterp.red: "red", ColorInterp.green: "green", ColorInterp.blue: "blue"}


@dataclass(frozen=True)
class Piece:
    """A raster that holds some bands of an image, or of a rectangle of it."""

    file: File
    """The raster."""

    bands: tuple[int, ...]
    """For each of its bands the band of the image, from 1."""

    width: int
    """Its columns."""

    height: int
    """Its rows."""

    column: int = 0
    """Its first column in the image, in its own pixels."""

    row: int = 0
    """Its first row in the image, in its own pixels."""

    zoom: int = 1
    """Side of its pixels, in pixels of the image."""


@dataclass(frozen=True)
class Header:
    """Header of an image."""

    file: File
    """The raster, or the product."""

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

    pieces: tuple[Piece, ...]
    """Rasters that hold its pixels."""

    metadata: tuple[File, ...] = ()
    """Files of a product's metadata, which decide its values too."""

    saturated: float | None = None
    """Value of a saturated pixel; None takes the largest of an unsigned type."""

    mask: CloudMask | None = None
    """Cloud mask that is part of a product."""

    calibration: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Scale and offset by the common name of a band, of products that do not say which band of a file is which."""

    flaw: str | None = None
    """Reason why its values cannot be converted to reflectance by its metadata; None if they can."""

    processing: str | None = None
    """Version of a product's processing that decides its offsets, in words."""

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
        return replace(self, crs=grid.crs, transform=(step_x, 0.0, grid.west, 0.0, -step_y, grid.north))

    def files(self, bands: Sequence[int]) -> tuple[File, ...]:
        """Return the files that decide the pixels of these bands."""
        return (*self.metadata, *(piece.file for piece in self.pieces if set(piece.bands) & set(bands)))

    def zooms(self, bands: Sequence[int]) -> dict[int, list[int]]:
        """Return the positions in ``bands`` by the side of their pixels, in pixels of the image."""
        zoom_of = {band: piece.zoom for piece in self.pieces for band in piece.bands}
        found: dict[int, list[int]] = {}
        for place, band in enumerate(bands):
            found.setdefault(zoom_of[band], []).append(place)
        return found

    def at(self, zoom: int) -> Header:
        """Return the header of the bands whose pixels have this side, on their own grid."""
        a, b, c, d, e, f = self.affine[:6]
        transform = (a * zoom, b * zoom, c, d * zoom, e * zoom, f)
        pieces = tuple(replace(piece, zoom=1) for piece in self.pieces if piece.zoom == zoom)
        return replace(self, width=self.width // zoom, height=self.height // zoom, transform=transform, pieces=pieces)


@dataclass(frozen=True)
class CloudMask:
    """A mask of clouds, and the meaning of its values."""

    header: Header
    """The raster."""

    cloud: tuple[int, ...]
    """Values that are cloud or shadow, in any of the bands."""

    unknown: tuple[int, ...]
    """Values that say nothing."""

    bands: tuple[int, ...] = (1,)
    """Bands that count, from 1."""


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


@contextlib.contextmanager
def opened(file: File) -> Iterator[DatasetReader]:
    """Open a raster of one of the known formats.

    Raises:
        UnusableError: ``unreadable``, also for an error while the raster is open.
    """
    driver = DRIVERS.get(Path(file.name).suffix.lower())
    if driver is None:
        raise UnusableError("unreadable", f"{file.name} is no {', '.join(DRIVERS)} file")
    try:
        with gdal(), rasterio.open(file.location, driver=driver) as raster:
            yield raster
    except (RasterioError, ValueError, MemoryError) as error:
        raise UnusableError("unreadable", f"{file.name} is damaged or truncated ({error})") from error


def read_raster(file: File) -> Header:
    """Read the header of a raster.

    Raises:
        UnusableError: If it is no raster of the known formats, of absurd size, or placed only by ground control points
            or RPCs.
    """
    with opened(file) as raster:
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
            pieces=(Piece(file, tuple(range(1, raster.count + 1)), raster.width, raster.height),),
        )


def digest(file: File) -> str:
    """Return the SHA-256 of a file, in hex; each process computes it once."""
    status = file.path.stat()
    return _digest(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(file: File, size: int, changed: int) -> str:
    with file.open() as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
