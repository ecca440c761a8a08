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
from typing import Any, Protocol

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rasterio.session import DummySession

from sharding.errors import RevisitError, UnusableError
from sharding.prepare.options import BAND_NAMES, LR_SIZE, SampleOptions
from sharding.sources.options import is_day
from sharding.sources.source import NO_CLM, Bounds, Revisit, Scene
from sharding.sources.worldstrat.facts import bands_by_name, check_place, clear_nodata, land_of
from sharding.sources.worldstrat.files import MAX_BYTES, SourceFile

# Bands of the SPOT rasters from 1: red, green, blue, near infrared.
SPOT_RGB = (1, 2, 3)
SPOT_SCALE = 10_000
"""SPOT counts per reflectance of 1."""
MOST_SHRUNK = 1.5
"""LR pixels per pixel of the usual LR grid above which revisits are not shrunk to it; WorldStrat's have up to 1.02."""

DATES = ("lowres_date", "datetime")
"""Keys of a revisit's date in its metadata."""

_IN_MEMORY = re.compile(r"/vsimem/[\w./-]+")

GEOREFERENCE = "bounds of the Sentinel-2 rasters divided by each grid's size; the SPOT rasters carry none"

Georeference = tuple[str | None, tuple[float, float, float, float]]
"""Coordinate system, and west, south, east, north in it."""


class Files(Protocol):
    """Files of one AOI, see `sharding.sources.worldstrat.layout.AoiFiles`."""

    @property
    def name(self) -> str:
        """Name of the AOI."""
        ...

    @property
    def hr(self) -> Mapping[str, SourceFile]:
        """SPOT rasters by name."""
        ...

    @property
    def mask_nodata(self) -> bool:
        """True to leave pixels without data out."""
        ...

    @property
    def scale(self) -> float:
        """Reflectance of a value of 1 in the revisits."""
        ...

    @property
    def offset(self) -> float:
        """Reflectance of a value of 0 in them."""
        ...

    @property
    def offset_since(self) -> str | None:
        """First day whose revisits have ``offset``; None if all have it."""
        ...

    def candidates(self, options: SampleOptions, /) -> Mapping[int, Mapping[str, SourceFile]]:
        """Return the revisits from which a sample is chosen."""
        ...


def read_scene(aoi: Files, options: SampleOptions, *, target: bool = True) -> Scene:
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
    metadata = [reader.metadata(item.get("metadata")) for item in files]
    offsets = [_offset(number, item, aoi) for number, item in zip(candidates, metadata, strict=True)]
    with _gdal():
        images = {number: item[options.data_layer] for number, item in candidates.items()}
        lr, (crs, bounds), masked = _read_lr(reader, images, options, (aoi.scale, offsets))
        size = lr.shape[-2:]

        def masks(layer: str) -> list[NDArray[np.uint8] | None]:
            return [reader.mask(item[layer], size) if layer in item else None for item in files]

        clm, scl, data = masks("CLM"), masks("SCL"), masks("dataMask")
        spot = _Spot(reader, crs, bounds)
        hr, pan = _read_spot(spot, aoi.hr[options.hr] if target else None, aoi.hr["pan"], options.hr)
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
        hr=_reflectance(hr),
        hr_valid=_seen(hr),
        pan=_reflectance(pan),
        pan_valid=_seen(pan),
        rgb=options.rgb,
        labels={
            "lr": tuple(map(str, options.band_numbers)),
            "hr": tuple(map(str, SPOT_RGB)),
            "pan": ("1",),
        },
        titles={"hr": f"the SPOT {options.hr} raster", "pan": "the SPOT pan raster"},
        revisits=tuple(
            _revisit(number, item, mask is not None)
            for number, item, mask in zip(candidates, metadata, clm, strict=True)
        ),
        hr_date=_text(metadata[0], "highres_date", "target_date"),
        crs=crs,
        bounds=bounds,
        land=land_of(crs, bounds),
        georeference=GEOREFERENCE,
        counts={"at_limit": dict(reader.at_limit)},
        facts={"level": options.level, "bands": list(options.band_numbers)},
        sources=dict(sorted(reader.digests.items())),
        bytes_in=reader.bytes_in,
        limit=1.0,  # as in the published pipeline
        masked=masked or spot.masked or aoi.mask_nodata,
        keeps_valid=aoi.mask_nodata,
    )


class _Reader:
    """Reader of an AOI's files; it reads each once, keeps the digests, and counts values at the limit of their type."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.at_limit: Counter[str] = Counter()
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

    def count_limit(self, name: str, stored: NDArray[Any]) -> None:
        """Count the values of integers that are the largest of their type; ``name`` is the image's in a sample."""
        if stored.dtype.kind in "iu" and stored.max() == (limit := np.iinfo(stored.dtype).max):
            self.at_limit[name] += int(np.count_nonzero(stored == limit))

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
    reader: _Reader, files: Mapping[int, SourceFile], options: SampleOptions, radiometry: tuple[float, Sequence[float]]
) -> tuple[NDArray[np.float32], Georeference, bool]:
    """Read the revisits' images [R, C, h, w], their georeference, and whether a nodata tag cleared pixels.

    Args:
        reader: Reader of the files.
        files: Images by number.
        options: Options of the sample.
        radiometry: Reflectance of a value of 1, and of a value of 0 in each image.

    Raises:
        RevisitError: For the first image of another size than most.
        UnusableError: Images so large that they would be shrunk unasked.
    """
    bands, georeference, masked = options.band_numbers, None, False
    names = [BAND_NAMES[options.level][number - 1] for number in bands]
    scale, offsets = radiometry
    told = scale != 1.0 or any(offsets)
    images: list[NDArray[np.float32]] = []
    for file, offset in zip(files.values(), offsets, strict=True):
        with reader.open(file, bands, georeference=georeference is None) as raster:
            if np.dtype(raster.dtypes[0]).kind != "f" and not told:
                raise UnusableError(
                    "wrong-type",
                    f"{file.name} holds {raster.dtypes[0]}, reflectance is float32: give --scale, such as 0.0001",
                )
            stored = raster.read(list(bands_by_name(file.name, raster, bands, names)))
            masked |= clear_nodata(raster, stored)
            reader.count_limit("lr", stored)
            image = np.asarray(stored, dtype=np.float32)
            if scale != 1.0 or offset:
                image = np.where(image != 0, image * np.float32(scale) + np.float32(offset), np.float32(0))
            if georeference is None:
                west, south, east, north = raster.bounds
                georeference = str(raster.crs) if raster.crs else None, (west, south, east, north)
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
    if options.lr_size == LR_SIZE and max(usual[-2:]) > MOST_SHRUNK * LR_SIZE:
        raise UnusableError(
            "size-mismatch",
            f"{next(iter(files.values())).name} is {_by(usual)}, and WorldStrat's {LR_SIZE}: it is not shrunk unasked; "
            f"--native keeps its pixels, an --lr-size other than {LR_SIZE} resizes it, --source scenes cuts into tiles",
        )
    return np.stack(images), georeference, masked


class _Spot:
    """Reader of the SPOT rasters, which may have a georeference that must meet the revisits'."""

    def __init__(self, reader: _Reader, crs: str | None, bounds: Bounds) -> None:
        self._reader, self._crs, self._bounds = reader, crs, bounds
        self.masked = False

    def read(self, file: SourceFile, bands: Sequence[int], names: Sequence[str]) -> NDArray[np.uint16]:
        with self._reader.open(file, bands, georeference=True) as raster:
            if raster.dtypes[0] != "uint16":
                raise UnusableError("wrong-type", f"{file.name} holds {raster.dtypes[0]}, SPOT rasters are uint16")
            check_place(file.name, raster, self._crs, self._bounds)
            image: NDArray[np.uint16] = raster.read(list(bands_by_name(file.name, raster, bands, names)))
            self.masked |= clear_nodata(raster, image)
            self._reader.count_limit("pan" if len(bands) == 1 else "hr", image)
        return image


def _read_spot(
    reader: _Spot, hr_file: SourceFile | None, pan_file: SourceFile, hr_source: str
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Read target and PAN, which has 1 pixel per pixel of ``_ps``, and a whole number of them, 4, per ``_rgbn``."""
    hr = reader.read(hr_file, SPOT_RGB, ("red", "green", "blue")) if hr_file else None
    pan = reader.read(pan_file, (1,), ("pan",))
    if hr is None or hr_file is None:
        return pan[:0], pan
    expected = max(1, round(pan.shape[-1] / hr.shape[-1])) if hr_source == "rgbn" else 1
    for mine, theirs in zip(pan.shape[-2:], hr.shape[-2:], strict=True):
        if abs(mine - expected * theirs) > 2 * (expected - 1):
            raise UnusableError(
                "size-mismatch", f"{pan_file.name} is {_by(pan.shape)}, {hr_file.name} is {_by(hr.shape)}"
            )
    return hr, pan


def _reflectance(counts: NDArray[np.uint16]) -> NDArray[np.float32]:
    reflectance = counts.astype(np.float32)
    reflectance /= np.float32(SPOT_SCALE)
    return reflectance


def _seen(image: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Return the mask [h, w] of a SPOT image's pixels with data."""
    if image.size and image.min() > 0:
        return np.ones(image.shape[-2:], np.bool_)
    return np.asarray((image != 0).any(axis=0))


def _range(file: SourceFile, image: NDArray[np.generic]) -> tuple[float, float]:
    """Return the least and the greatest value of a raster, and check that they are finite; NaN would be both."""
    low, high = float(image.min()), float(image.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UnusableError("not-finite", f"{file.name} holds NaN or infinite values")
    return low, high


def _by(shape: Sequence[int]) -> str:
    return f"{shape[-2]} x {shape[-1]} px"


def _offset(number: int, metadata: Mapping[str, object], aoi: Files) -> float:
    """Return the reflectance of a value of 0 in a revisit: none if it is older than the first day that has the offset.

    Raises:
        RevisitError: ``no-date``, if the revisit's metadata name no day.
    """
    if aoi.offset_since is None:
        return aoi.offset
    day = (_text(metadata, *DATES) or "")[:10]
    if not is_day(day):
        raise RevisitError("no-date", f"revisit {number} has no date, which --offset-since needs", number)
    return aoi.offset if day >= aoi.offset_since else 0.0


def _revisit(number: int, metadata: Mapping[str, object], has_clm: bool) -> Revisit:
    cover = metadata.get("cloud_cover")
    known = isinstance(cover, int | float) and 0 <= cover <= 100  # NaN is neither
    return Revisit(
        number=number,
        date=_text(metadata, *DATES),
        cloud_cover=float(cover) if known else None,  # type: ignore[arg-type]
        has_clm=has_clm,
    )


def _text(metadata: Mapping[str, object], *keys: str) -> str | None:
    """Return the value of the first existing key: the two key sets have different names for the same value."""
    return next((str(metadata[key]) for key in keys if metadata.get(key) is not None), None)
