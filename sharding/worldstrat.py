"""WorldStrat as it is published: finding the areas of interest in a folder, and reading one of them.

Facts of the data set that this module holds: AOI names contain spaces and hyphens; a revisit's number is the last
``-<n>-`` of a file's name and the order is numeric; revisit rasters differ in size between AOIs but not within
one; SPOT rasters carry no georeference; the per-revisit metadata has one of two key sets; SCL is optional.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rasterio.session import DummySession

from sharding.errors import UserError
from sharding.splits import natural_key

HR_SOURCES = ("ps", "rgbn")
SPLIT_FILE = "stratified_train_val_test_split.csv"
HR_FOLDER, LR_FOLDER, LEVEL = "hr_dataset", "lr_dataset", "L2A"
# Bands are numbered from 1: blue 2, green 3, red 4 in the L2A rasters; red, green, blue in the SPOT ones.
S2_RGB = (4, 3, 2)
SPOT_RGB = (1, 2, 3)
SPOT_SCALE = 10_000.0

_REVISIT_RASTER = re.compile(r"(\d+)-(L2A_data|CLM|CLP|SCL|dataMask)\.tiff")
_REVISIT_METADATA = re.compile(r"(\d+)\.metadata")


class UnusableError(Exception):
    """An AOI cannot become a sample.

    Attributes:
        reason: a short code for the index.
        detail: what was met, in words.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class AoiFiles:
    """Which files of an AOI exist; nothing has been read."""

    name: str
    """The AOI."""

    hr: Mapping[str, Path]
    """``ps``, ``rgbn``, ``pan`` to the SPOT raster."""

    revisits: Mapping[int, Mapping[str, Path]]
    """Per revisit number in numeric order, ``L2A_data``, ``CLM``, ``SCL``, ``dataMask``, ``metadata`` to the file."""


@dataclass(frozen=True)
class Revisit:
    """What is known of one Sentinel-2 image beside its pixels."""

    number: int
    """Its number in the source."""

    date: str | None
    """Day of acquisition, ``YYYY-MM-DD``."""

    cloud_cover: float | None
    """Percent, as the source says."""


@dataclass(frozen=True)
class Scene:
    """One AOI as it was read, on the sources' grids."""

    aoi: str
    """Its name."""

    lr: NDArray[np.float32]
    """[R, C, h, w] Sentinel-2 reflectance."""

    clm: NDArray[np.uint8]
    """[R, 1, h, w] cloud masks: 0 clear, 1 cloud, 255 no data."""

    scl: tuple[NDArray[np.uint8] | None, ...]
    """Per revisit, [1, h, w] scene classification, None where the source has none."""

    valid: NDArray[np.uint8]
    """[R, 1, h, w] 1 where the revisit has data."""

    hr: NDArray[np.uint16]
    """[3, H, W] SPOT red, green, blue in 1/10000; 0 is no data."""

    pan: NDArray[np.uint16]
    """[1, H, W] SPOT panchromatic in 1/10000; 0 is no data."""

    revisits: tuple[Revisit, ...]
    """Of each image of ``lr``."""

    hr_date: str | None
    """Day of the SPOT image."""

    crs: str
    """Coordinate system of ``bounds``, such as ``EPSG:4326``."""

    bounds: tuple[float, float, float, float]
    """West, south, east, north of the L2A rasters."""

    sources: Mapping[str, str]
    """SHA-256 in hex of every file that was read, by file name."""


def find_aois(folder: Path) -> list[AoiFiles]:
    """List the AOIs of a folder in the published layout, in natural order, complete or not.

    Raises:
        UserError: when the folder is missing or holds no AOI.
    """
    if not folder.is_dir():
        raise UserError(f"--input {folder} is no folder: give the one that holds {HR_FOLDER}/ and {LR_FOLDER}/")
    names = {
        entry.name
        for part in (HR_FOLDER, LR_FOLDER)
        if (folder / part).is_dir()
        for entry in (folder / part).iterdir()
        if entry.is_dir()
    }
    if not names:
        raise UserError(
            f"--input {folder} holds no AOI: it must hold {HR_FOLDER}/<AOI>/ and {LR_FOLDER}/<AOI>/{LEVEL}/"
        )
    return [_list_files(folder, name) for name in sorted(names, key=natural_key)]


def read_split_file(folder: Path) -> list[tuple[str, str]] | None:
    """Return the published split file's (AOI, split) rows, or None where there is no such file.

    Raises:
        UserError: when it is no CSV in UTF-8 with the columns ``tile`` and ``split``.
    """
    path = folder / SPLIT_FILE
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="")
            if not {"tile", "split"} <= set(reader.fieldnames or ()):
                raise UserError(f"{path} lacks the column tile or split: use the published file, or --split seeded")
            return [(row["tile"], row["split"]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read as CSV in UTF-8 ({error}): use the published file, or --split seeded"
        ) from error


def check_files(aoi: AoiFiles, hr_source: str, num_revisits: int) -> None:
    """Check that the files a sample needs are there, without reading them.

    Raises:
        UnusableError: when one is missing.
    """
    for suffix in (hr_source, "pan"):
        if suffix not in aoi.hr:
            raise UnusableError("missing-raster", f"{aoi.name}_{suffix}.tiff is missing")
    if len(aoi.revisits) < num_revisits:
        raise UnusableError("too-few-revisits", f"{len(aoi.revisits)} revisits where {num_revisits} are needed")
    for number in list(aoi.revisits)[:num_revisits]:
        for layer in ("L2A_data", "CLM"):
            if layer not in aoi.revisits[number]:
                raise UnusableError("missing-raster", f"{aoi.name}-{number}-{layer}.tiff is missing")


def read_scene(aoi: AoiFiles, hr_source: str, num_revisits: int) -> Scene:
    """Read an AOI's first revisits in numeric order and its SPOT images.

    Args:
        aoi: its files, for which ``check_files`` passes.
        hr_source: ``ps`` or ``rgbn``.
        num_revisits: how many revisits to read.

    Raises:
        UnusableError: for a raster that is truncated, of the wrong size or band count, empty, or not finite.
    """
    reader = _Reader()
    numbers = list(aoi.revisits)[:num_revisits]
    files = [aoi.revisits[number] for number in numbers]
    lr = _stack([reader.raster(item["L2A_data"], S2_RGB) for item in files], files, "L2A_data")
    size = lr.shape[-2:]
    clm = _stack([reader.raster(item["CLM"], (1,), size) for item in files], files, "CLM")
    scl = tuple(reader.raster(item["SCL"], (1,), size).astype(np.uint8) if "SCL" in item else None for item in files)
    valid = [
        reader.raster(item["dataMask"], (1,), size) if "dataMask" in item else (image != 0).any(0, keepdims=True)
        for item, image in zip(files, lr, strict=True)
    ]
    hr, pan = reader.raster(aoi.hr[hr_source], SPOT_RGB), reader.raster(aoi.hr["pan"], (1,))
    _check_spot(aoi, hr, pan, hr_source)
    metadata = [reader.metadata(item.get("metadata")) for item in files]
    crs, bounds = reader.georeference(files[0]["L2A_data"])
    return Scene(
        aoi=aoi.name,
        lr=lr.astype(np.float32),
        clm=clm.astype(np.uint8),
        scl=scl,
        valid=(np.stack(valid) != 0).astype(np.uint8),
        hr=hr.astype(np.uint16),
        pan=pan.astype(np.uint16),
        revisits=tuple(_revisit(n, item) for n, item in zip(numbers, metadata, strict=True)),
        hr_date=_text(metadata[0], "highres_date", "target_date"),
        crs=crs,
        bounds=bounds,
        sources=dict(sorted(reader.digests.items())),
    )


class _Reader:
    """Reads files once each, and remembers their digests."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def raster(self, path: Path, bands: Sequence[int], size: tuple[int, ...] | None = None) -> NDArray[np.generic]:
        """Return [bands, h, w] of a raster; ``size`` is the (h, w) that it must have."""
        with self._open(path) as file:
            if file.count < max(bands):
                raise UnusableError("wrong-bands", f"{path.name} has {file.count} of {max(bands)} bands")
            image: NDArray[np.generic] = file.read(list(bands))
        if size is not None and image.shape[-2:] != size:
            raise UnusableError("wrong-size", f"{path.name} is {_by(image.shape)}, its L2A_data is {_by(size)}")
        if not np.isfinite(image).all():
            raise UnusableError("not-finite", f"{path.name} holds NaN or infinite values")
        return image

    def metadata(self, path: Path | None) -> dict[str, object]:
        """Return a revisit's metadata, empty where there is none."""
        if path is None:
            return {}
        try:
            data = json.loads(self._bytes(path))
        except ValueError as error:
            raise UnusableError("unreadable-metadata", f"{path.name} is no JSON ({error})") from error
        return data if isinstance(data, dict) else {}

    def georeference(self, path: Path) -> tuple[str, tuple[float, float, float, float]]:
        """Return a raster's CRS and its (west, south, east, north)."""
        with self._open(path) as file:
            west, south, east, north = file.bounds
            return str(file.crs), (west, south, east, north)

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[DatasetReader]:
        data = self._bytes(path)
        if not data:
            raise UnusableError("unreadable-raster", f"{path.name} is empty")
        try:
            # A session of its own: in an environment with S3 keys rasterio would log in anew for every file.
            with warnings.catch_warnings(), rasterio.Env(DummySession()), MemoryFile(data) as memory:
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                with memory.open() as file:
                    yield file
        except RasterioError as error:
            raise UnusableError("unreadable-raster", f"{path.name} is damaged or truncated ({error})") from error

    def _bytes(self, path: Path) -> bytes:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UnusableError("unreadable-raster", f"{path.name}: {error.strerror}") from error
        self.digests[path.name] = hashlib.sha256(data).hexdigest()
        return data


def _list_files(folder: Path, name: str) -> AoiFiles:
    spot = {suffix: folder / HR_FOLDER / name / f"{name}_{suffix}.tiff" for suffix in (*HR_SOURCES, "pan")}
    revisits: dict[int, dict[str, Path]] = {}
    level = folder / LR_FOLDER / name / LEVEL
    for path in level.iterdir() if level.is_dir() else ():
        # After the AOI's own name, whose hyphens and numbers must not be taken for a revisit's.
        rest = path.name.removeprefix(f"{name}-")
        if match := _REVISIT_RASTER.fullmatch(rest):
            revisits.setdefault(int(match[1]), {})[match[2]] = path
        elif match := _REVISIT_METADATA.fullmatch(rest):
            revisits.setdefault(int(match[1]), {})["metadata"] = path
    hr = {suffix: path for suffix, path in spot.items() if path.is_file()}
    return AoiFiles(name, hr, dict(sorted(revisits.items())))


def _stack(
    images: Sequence[NDArray[np.generic]], files: Sequence[Mapping[str, Path]], layer: str
) -> NDArray[np.generic]:
    for image, item in zip(images, files, strict=True):
        if image.shape != images[0].shape:
            raise UnusableError(
                "wrong-size",
                f"{item[layer].name} is {_by(image.shape)}, {files[0][layer].name} is {_by(images[0].shape)}",
            )
    return np.stack(images)


def _check_spot(aoi: AoiFiles, hr: NDArray[np.generic], pan: NDArray[np.generic], hr_source: str) -> None:
    """Check that PAN covers what the target covers: four pixels to one of ``_rgbn``, one to one of ``_ps``."""
    expected = 4 if hr_source == "rgbn" else 1
    for mine, theirs in zip(pan.shape[-2:], hr.shape[-2:], strict=True):
        if abs(mine - expected * theirs) > 2 * (expected - 1):
            raise UnusableError(
                "wrong-size", f"{aoi.hr['pan'].name} is {_by(pan.shape)}, {aoi.hr[hr_source].name} is {_by(hr.shape)}"
            )
    for path, image in ((aoi.hr["pan"], pan), (aoi.hr[hr_source], hr)):
        if image.dtype != np.uint16:
            raise UnusableError("wrong-type", f"{path.name} holds {image.dtype}, SPOT rasters are uint16")
        if not image.any():
            raise UnusableError("no-data", f"{path.name} is all zero")


def _by(shape: Sequence[int]) -> str:
    return f"{shape[-2]} x {shape[-1]} px"


def _revisit(number: int, metadata: Mapping[str, object]) -> Revisit:
    cover = metadata.get("cloud_cover")
    return Revisit(
        number=number,
        date=_text(metadata, "lowres_date", "datetime"),
        cloud_cover=float(cover) if isinstance(cover, int | float) else None,
    )


def _text(metadata: Mapping[str, object], *keys: str) -> str | None:
    """Return the first of the keys that is there: the two key sets have different names for one thing."""
    return next((str(metadata[key]) for key in keys if metadata.get(key) is not None), None)
