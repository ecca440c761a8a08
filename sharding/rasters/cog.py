"""Cloud-optimised GeoTIFFs, written row by row, so that memory does not depend on the size of the scene."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from PIL import Image
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import CRSError, RasterioError
from rasterio.io import DatasetWriter
from rasterio.session import DummySession
from rasterio.transform import Affine
from rasterio.windows import Window

from sharding.errors import UserError
from sharding.picture import to_rgb8

PixelType = Literal["uint16", "float32"]

SCALE = 1e-4
"""Reflectance of a stored uint16 of 1, as in Sentinel-2's products."""
BLOCK = 512
"""Side of a tile, px."""
PREVIEW_SIDE = 1024
"""Longest side of a preview, px."""
_RGB = ("red", "green", "blue")
_CACHE_BYTES = 128 << 20
"""Memory of GDAL's block cache; rasterio takes the number as bytes, GDAL itself as MB."""


@dataclass(frozen=True)
class RasterFacts:
    """Properties of a raster that its pixels do not tell."""

    height: int
    """Rows."""
    width: int
    """Columns."""
    bands: Sequence[str]
    """Name of each band."""
    crs: str | None
    """Coordinate system, such as ``EPSG:4326``."""
    transform: Sequence[float]
    """(a, b, c, d, e, f) from pixel to CRS."""
    pixels: PixelType = "uint16"
    """Type of the pixels: ``uint16`` in steps of ``SCALE``, 0 without data, or ``float32``, NaN without data."""
    tags: Mapping[str, str] | None = None
    """Tags of the file."""


class RasterRows:
    """Destination of a raster's rows, from top to bottom."""

    def __init__(self, file: DatasetWriter, facts: RasterFacts) -> None:
        self._file = file
        self._facts = facts
        self.next_row = 0
        """First row that is not written yet."""

    def write(self, image: NDArray[np.float32], valid: NDArray[np.bool_]) -> None:
        """Write the next rows: reflectance [C, n, W], and the mask [n, W] of the pixels with data."""
        rows = image.shape[-2]
        window = Window(0, self.next_row, self._facts.width, rows)
        self._file.write(_stored(image, valid, self._facts.pixels), window=window)
        self.next_row += rows


@contextmanager
def write_cog(path: Path, facts: RasterFacts) -> Iterator[RasterRows]:
    """Yield the destination of the rows, and make the file when all are written; none is left after an error.

    Overviews are averages. The same rows and facts give the same bytes. The rows are first written to a plain file
    beside ``path``, because GDAL makes a Cloud-optimised GeoTIFF of a whole raster only.

    Args:
        path: The file; its folder exists.
        facts: Properties of the raster.

    Raises:
        UserError: The disk is full or protected, or the CRS is unknown.
    """
    plain = path.with_suffix(".plain.tif")
    try:
        with _gdal():
            with rasterio.open(plain, "w", **_profile(facts)) as file:
                file.descriptions = tuple(facts.bands)
                if facts.pixels == "uint16":
                    file.scales = (SCALE,) * len(facts.bands)
                if tuple(facts.bands) == _RGB:
                    file.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
                file.update_tags(**(facts.tags or {}))
                rows = RasterRows(file, facts)
                yield rows
                assert rows.next_row == facts.height, "some rows were not written"
            rasterio.shutil.copy(
                plain,
                path,
                driver="COG",
                compress="deflate",
                predictor="yes",
                blocksize=BLOCK,
                overview_resampling="average",
                bigtiff="if_safer",
            )
    except (RasterioError, CRSError, OSError) as error:
        path.unlink(missing_ok=True)
        raise UserError(f"cannot write {path.name} in {path.parent}: {error}") from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        plain.unlink(missing_ok=True)


def preview_png(path: Path, rgb: Sequence[int]) -> bytes:
    """Return a PNG of a raster for people, at most ``PREVIEW_SIDE`` px wide or high; no data is black.

    Args:
        path: A file of `write_cog`.
        rgb: 0-based bands shown as red, green and blue; one band alone is grey.
    """
    with _gdal(), rasterio.open(path) as file:
        factor = max(1.0, max(file.shape) / PREVIEW_SIDE)
        size = tuple(max(1, round(side / factor)) for side in file.shape)
        image = file.read([band + 1 for band in rgb], out_shape=(len(rgb), *size), masked=True)
    shown = np.ma.filled(image.astype(np.float32), np.nan)
    buffer = io.BytesIO()
    Image.fromarray(to_rgb8(shown)).save(buffer, format="PNG")
    return buffer.getvalue()


def _profile(facts: RasterFacts) -> dict[str, object]:
    return {
        "driver": "GTiff",
        "count": len(facts.bands),
        "height": facts.height,
        "width": facts.width,
        "dtype": facts.pixels,
        "nodata": 0 if facts.pixels == "uint16" else float("nan"),
        "crs": CRS.from_string(facts.crs) if facts.crs else None,
        "transform": Affine(*facts.transform),
        "interleave": "band",
        "bigtiff": "if_safer",
        "photometric": "rgb" if tuple(facts.bands) == _RGB else "minisblack",
    }


def _stored(image: NDArray[np.float32], valid: NDArray[np.bool_], pixels: PixelType) -> NDArray[np.generic]:
    """Return reflectance [C, n, W] as stored; a valid pixel never gets the value that means no data."""
    if pixels == "float32":
        return np.where(valid, image, np.float32(np.nan))
    steps = np.clip(np.rint(image / np.float32(SCALE)), 1, np.iinfo(np.uint16).max)
    return np.where(valid, steps, 0).astype(np.uint16)


@contextmanager
def _gdal() -> Iterator[None]:
    # A session of its own: in an environment with S3 keys rasterio would open an S3 session.
    with rasterio.Env(DummySession(), GDAL_CACHEMAX=_CACHE_BYTES, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):
        yield
