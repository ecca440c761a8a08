"""Rasters of one AOI, read unchanged and checked on the way.

Facts of the dataset that this module relies on: revisit rasters differ in size between AOIs but not within one; SPOT
rasters carry no georeference; the per-revisit metadata has one of two key sets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rasterio.session import DummySession

from sharding.errors import RevisitError, UnusableError
from sharding.prepare.options import SampleOptions
from sharding.sources.worldstrat.files import MAX_BYTES, SourceFile
from sharding.sources.worldstrat.layout import AoiFiles

# Bands of the SPOT rasters from 1: red, green, blue, near infrared.
SPOT_RGB = (1, 2, 3)
NO_CLM = 255
"""Value of a cloud mask where nothing is known."""

_IN_MEMORY = re.compile(r"/vsimem/[\w./-]+")

Georeference = tuple[str, tuple[float, float, float, float]]
"""Coordinate system, and west, south, east, north in it."""


@dataclass(frozen=True)
class Revisit:
    """Metadata of one Sentinel-2 image."""

    number: int
    """Its number in the source."""

    date: str | None
    """Day of acquisition, ``YYYY-MM-DD``."""

    cloud_cover: float | None
    """Cloud cover in percent, from the source's metadata."""

    has_clm: bool
    """True if the source has a cloud mask of it."""


@dataclass(frozen=True)
class Scene:
    """Rasters of one AOI, on the sources' grids."""

    aoi: str
    """Its name."""

    lr: NDArray[np.float32]
    """[R, C, h, w] Sentinel-2 reflectance of the candidate revisits."""

    clm: NDArray[np.uint8]
    """[R, 1, h, w] cloud masks: 0 clear, 1 cloud, 255 no data, also where the source has no mask."""

    scl: tuple[NDArray[np.uint8] | None, ...]
    """Scene classification [1, h, w] per revisit; None if the source has none."""

    valid: NDArray[np.bool_]
    """[R, 1, h, w] mask of pixels with data."""

    hr: NDArray[np.uint16]
    """[3, H, W] SPOT red, green, blue in 1/10000; 0 is no data. [0, H, W] in a scene that was read without target."""

    pan: NDArray[np.uint16]
    """[1, H, W] SPOT panchromatic in 1/10000; 0 is no data."""

    revisits: tuple[Revisit, ...]
    """Metadata of each image of ``lr``."""

    hr_date: str | None
    """Day of the SPOT image."""

    crs: str
    """Coordinate system of ``bounds``, such as ``EPSG:4326``."""

    bounds: tuple[float, float, float, float]
    """West, south, east, north of the Sentinel-2 rasters."""

    sources: Mapping[str, str]
    """SHA-256, in hex, of every file that was read, by file name."""

    bytes_in: int
    """Total size of these files."""


def read_scene(aoi: AoiFiles, options: SampleOptions, *, target: bool = True) -> Scene:
    """Read an AOI's SPOT images and the candidate revisits of its sample.

    Args:
        aoi: Its files, which pass ``check_files``.
        options: Options of the sample.
        target: False to leave the target out.

    Raises:
        UnusableError: For a raster that is damaged, not finite, or has a wrong size, type or number of bands.
    """
    reader = _Reader()
    candidates = aoi.candidates(options)
    files = list(candidates.values())
    with _gdal():
        images = {number: item[options.data_layer] for number, item in candidates.items()}
        lr, (crs, bounds) = _read_lr(reader, images, options.band_numbers)
        size = lr.shape[-2:]

        def masks(layer: str) -> list[NDArray[np.uint8] | None]:
            return [reader.mask(item[layer], size) if layer in item else None for item in files]

        clm, scl, data = masks("CLM"), masks("SCL"), masks("dataMask")
        hr, pan = _read_spot(reader, aoi.hr[options.hr] if target else None, aoi.hr["pan"], options.hr)
    metadata = [reader.metadata(item.get("metadata")) for item in files]
    unknown = np.full((1, *size), NO_CLM, np.uint8)
    valid = [
        (image != 0).any(0, keepdims=True) if mask is None else mask != 0 for image, mask in zip(lr, data, strict=True)
    ]
    return Scene(
        aoi=aoi.name,
        lr=lr,
        clm=np.stack([unknown if mask is None else mask for mask in clm]),
        scl=tuple(scl),
        valid=np.stack(valid),
        hr=hr,
        pan=pan,
        revisits=tuple(
            _revisit(number, item, mask is not None)
            for number, item, mask in zip(candidates, metadata, clm, strict=True)
        ),
        hr_date=_text(metadata[0], "highres_date", "target_date"),
        crs=crs,
        bounds=bounds,
        sources=dict(sorted(reader.digests.items())),
        bytes_in=reader.bytes_in,
    )


class _Reader:
    """Reader of an AOI's files; it reads each once and keeps the digests."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.bytes_in = 0

    @contextlib.contextmanager
    def open(self, file: SourceFile, bands: Sequence[int], georeference: bool = False) -> Iterator[DatasetReader]:
        """Open a raster with these bands, numbered from 1; read its georeference only if ``georeference``."""
        data = self._bytes(file)
        if not data:
            raise UnusableError("unreadable", f"{file.name} is empty")
        try:
            # Only as GeoTIFF: some other formats of GDAL refer to further files or addresses.
            places = {} if georeference else {"GEOREF_SOURCES": "NONE"}
            with MemoryFile(data) as memory, memory.open(driver="GTiff", **places) as raster:
                if raster.count < max(bands):
                    raise UnusableError("wrong-bands", f"{file.name} has {raster.count} of {max(bands)} bands")
                unpacked = raster.width * raster.height * len(bands) * np.dtype(raster.dtypes[0]).itemsize
                if unpacked > MAX_BYTES:
                    raise UnusableError(
                        "absurd-size", f"{file.name} claims {unpacked} bytes of pixels, the most is {MAX_BYTES}"
                    )
                yield raster
        except (RasterioError, ValueError) as error:  # a damaged text field is a UnicodeDecodeError
            # GDAL names the file by its random place in memory, and two runs would give two reasons.
            reason = _IN_MEMORY.sub(file.name, str(error))
            raise UnusableError("unreadable", f"{file.name} is damaged or truncated ({reason})") from error

    def mask(self, file: SourceFile, size: tuple[int, ...]) -> NDArray[np.uint8]:
        """Read a mask [1, h, w]; ``size`` is the required (h, w)."""
        with self.open(file, (1,)) as raster:
            mask: NDArray[np.generic] = raster.read([1])
        if mask.dtype.kind not in "iuf":
            raise UnusableError("wrong-type", f"{file.name} holds {mask.dtype}, masks are real numbers")
        if mask.shape[-2:] != size:
            raise UnusableError("size-mismatch", f"{file.name} is {_by(mask.shape)}, its image is {_by(size)}")
        low, high = _range(file, mask)
        if low < 0 or high > np.iinfo(np.uint8).max:
            raise UnusableError("wrong-type", f"{file.name} holds values from {low:g} to {high:g}, masks 0 to 255")
        return mask.astype(np.uint8)

    def metadata(self, file: SourceFile | None) -> dict[str, object]:
        """Read a revisit's metadata; empty if there is none."""
        if file is None:
            return {}
        try:
            data = json.loads(self._bytes(file))
        except (ValueError, RecursionError) as error:
            raise UnusableError("unreadable", f"{file.name} is no JSON ({error})") from error
        return data if isinstance(data, dict) else {}

    def _bytes(self, file: SourceFile) -> bytes:
        data = file.read()
        self.digests[file.name] = hashlib.sha256(data).hexdigest()
        self.bytes_in += len(data)
        return data


@contextlib.contextmanager
def _gdal() -> Iterator[None]:
    """Configure GDAL for many small rasters in memory."""
    # A session of its own: in an environment with S3 keys rasterio would open a new S3 session for every file. GDAL
    # reads uncompressed pixels directly to the array, without the block cache.
    options = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GTIFF_VIRTUAL_MEM_IO": "IF_ENOUGH_RAM"}
    with warnings.catch_warnings(), rasterio.Env(DummySession(), **options):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def _read_lr(
    reader: _Reader, files: Mapping[int, SourceFile], bands: Sequence[int]
) -> tuple[NDArray[np.float32], Georeference]:
    """Read the revisits' images [R, C, h, w] and their georeference.

    Raises:
        RevisitError: For the first image of another size than most.
    """
    georeference = None
    images: list[NDArray[np.float32]] = []
    for file in files.values():
        with reader.open(file, bands, georeference=georeference is None) as raster:
            if np.dtype(raster.dtypes[0]).kind != "f":
                raise UnusableError("wrong-type", f"{file.name} holds {raster.dtypes[0]}, reflectance is float32")
            image = np.asarray(raster.read(list(bands)), dtype=np.float32)
            if georeference is None:
                west, south, east, north = raster.bounds
                georeference = str(raster.crs), (west, south, east, north)
        _range(file, image)
        images.append(image)
    assert georeference is not None
    (usual, _), *others = Counter(image.shape for image in images).most_common()
    if others:
        like = next(file for file, image in zip(files.values(), images, strict=True) if image.shape == usual)
        for (number, file), image in zip(files.items(), images, strict=True):
            if image.shape != usual:
                detail = f"{file.name} is {_by(image.shape)}, {like.name} is {_by(usual)}"
                raise RevisitError("size-mismatch", detail, number)
    return np.stack(images), georeference


def _read_spot(
    reader: _Reader, hr_file: SourceFile | None, pan_file: SourceFile, hr_source: str
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Read target and PAN. They cover the same land: 4 pixels of PAN per pixel of ``_rgbn``, 1 per pixel of ``_ps``."""

    def read(file: SourceFile, bands: Sequence[int]) -> NDArray[np.uint16]:
        with reader.open(file, bands) as raster:
            if raster.dtypes[0] != "uint16":
                raise UnusableError("wrong-type", f"{file.name} holds {raster.dtypes[0]}, SPOT rasters are uint16")
            image: NDArray[np.uint16] = raster.read(list(bands))
        return image

    hr = read(hr_file, SPOT_RGB) if hr_file else None
    pan = read(pan_file, (1,))
    if hr is None or hr_file is None:
        return pan[:0], pan
    expected = 4 if hr_source == "rgbn" else 1
    for mine, theirs in zip(pan.shape[-2:], hr.shape[-2:], strict=True):
        if abs(mine - expected * theirs) > 2 * (expected - 1):
            raise UnusableError(
                "size-mismatch", f"{pan_file.name} is {_by(pan.shape)}, {hr_file.name} is {_by(hr.shape)}"
            )
    return hr, pan


def _range(file: SourceFile, image: NDArray[np.generic]) -> tuple[float, float]:
    """Return the least and the greatest value of a raster, and check that they are finite; NaN would be both."""
    low, high = float(image.min()), float(image.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UnusableError("not-finite", f"{file.name} holds NaN or infinite values")
    return low, high


def _by(shape: Sequence[int]) -> str:
    return f"{shape[-2]} x {shape[-1]} px"


def _revisit(number: int, metadata: Mapping[str, object], has_clm: bool) -> Revisit:
    cover = metadata.get("cloud_cover")
    known = isinstance(cover, int | float) and 0 <= cover <= 100  # NaN is neither
    return Revisit(
        number=number,
        date=_text(metadata, "lowres_date", "datetime"),
        cloud_cover=float(cover) if known else None,  # type: ignore[arg-type]
        has_clm=has_clm,
    )


def _text(metadata: Mapping[str, object], *keys: str) -> str | None:
    """Return the value of the first existing key: the two key sets have different names for the same value."""
    return next((str(metadata[key]) for key in keys if metadata.get(key) is not None), None)
