"""Patches of WorldView-3, QuickBird and GaoFen-2 in HDF5 files (Deng et al., "Machine Learning in Pansharpening: A
Benchmark", IEEE GRSM 10(3), 2022): a multispectral image, the panchromatic image, and the target."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np

from sharding.errors import UnusableError, UserError
from sharding.format.index import SPLITS
from sharding.format.layout import Bands, Facts, SampleLayout, fitted_facts, rgb_positions
from sharding.prepare.options import SampleOptions
from sharding.run.splits import natural_key
from sharding.sources.options import SourceOptions
from sharding.sources.source import NO_CLM, Revisit, Scene

SUFFIXES = (".h5", ".hdf5", ".mat")
BITS = {"wv3": 11, "wv2": 11, "wv4": 11, "qb": 11, "gf2": 10}
"""Bits of a value, by the sensor that a file's name holds."""
BANDS = {
    4: ("blue", "green", "red", "nir"),
    8: ("coastal", "blue", "green", "yellow", "red", "rededge", "nir", "nir2"),
}
"""Names of the bands by their number, in the files' order."""
SPLIT_NAMES = {"train": "train", "valid": "val", "val": "val", "test": "test"}
"""Split by the beginning of a file's name."""
MAX_BYTES = 1 << 30
"""Size limit of a patch and of a compressed chunk, bytes."""
GEOREFERENCE = "none: patches of HDF5 files have no coordinates"


@dataclass(frozen=True)
class PatchFile:
    """One HDF5 file."""

    path: Path
    """Its place on this machine."""

    name: str
    """Path below the folder."""

    size: int
    """Size in bytes."""

    bits: int
    """Bits of a value."""

    changed: int
    """Time of its last change, ns."""


@dataclass(frozen=True)
class Patch:
    """One patch; implements `sharding.sources.source.SceneFiles`."""

    name: str
    """Name of the file and number of the patch."""

    file: PatchFile
    """Its file."""

    number: int
    """Its number in the file, from 0."""

    unusable: bool = False
    """True if its only image shows nothing."""

    @property
    def group(self) -> str:
        """Name of the group: the patch itself, since its place on land is unknown."""
        return self.name

    @property
    def footprint(self) -> None:
        """None: patches have no coordinates."""
        return None

    @property
    def recipe(self) -> str:
        """Text of what decides the pixels beside the file."""
        return f"{self.file.bits} bits, patch {self.number}"

    def used(self, options: SampleOptions) -> tuple[PatchFile]:
        """Return its file."""
        return (self.file,)

    def spare(self, options: SampleOptions) -> tuple[()]:
        """Return nothing: a patch has one image."""
        return ()

    def without(self, number: int) -> Patch:
        """Return the patch without its only image."""
        return replace(self, unusable=True)

    def check(self, options: SampleOptions) -> None:
        """Check that there is an image; the file was checked when it was listed.

        Raises:
            UnusableError: If there is none.
        """
        if self.unusable:
            raise UnusableError("too-few-revisits", "its only image shows nothing")

    def read(self, options: SampleOptions) -> Scene:
        """Read the patch.

        Raises:
            UnusableError: If it is damaged or not finite.
        """
        scale = 1 / (2**self.file.bits - 1)
        with _reading(self.file.name):
            arrays = _open(self.file.path, self.file.size, self.file.changed)
            stored = {name: np.asarray(arrays[name][self.number], np.float32) for name in ("ms", "gt", "pan")}
        limit = {image: int(np.count_nonzero(values >= 2**self.file.bits - 1)) for image, values in stored.items()}
        for name, values in stored.items():
            if not np.isfinite(values).all():
                raise UnusableError("not-finite", f"{name} of patch {self.number} holds NaN or infinite values")
            if values.max() >= 2**self.file.bits:
                raise UnusableError(
                    "implausible",
                    f"{name} of patch {self.number} holds {values.max():g}, more than {self.file.bits} bits: "
                    "give --bits",
                )
            values *= np.float32(scale)
        lr, hr, pan = stored["ms"][None], stored["gt"], stored["pan"]
        names = BANDS.get(len(hr)) or tuple(f"band{band}" for band in range(1, len(hr) + 1))
        return Scene(
            aoi=self.name,
            lr=lr,
            clm=np.full((1, 1, *lr.shape[-2:]), NO_CLM, np.uint8),
            scl=(None,),
            valid=np.ones((1, 1, *lr.shape[-2:]), np.bool_),
            hr=hr,
            hr_valid=np.ones(hr.shape[-2:], np.bool_),
            pan=pan,
            pan_valid=np.ones(pan.shape[-2:], np.bool_),
            rgb=rgb_positions(names),
            labels={"lr": names, "hr": names, "pan": ("pan",)},
            titles={"hr": "gt", "pan": "pan"},
            revisits=(Revisit(1, None, None, False),),
            hr_date=None,
            crs=None,
            bounds=(0.0, 0.0, float(hr.shape[-1]), float(hr.shape[-2])),
            land=None,
            georeference=GEOREFERENCE,
            facts={"bands": list(names), "radiometry": {"scale": scale, "bits": self.file.bits}},
            sources={self.file.name: f"patch {self.number}"},
            bytes_in=sum(values.nbytes for values in stored.values()),
            counts={"at_limit": {image: count for image, count in limit.items() if count}},
        )


class PanCollectionSource:
    """A folder of HDF5 files; implements `sharding.sources.source.Source`."""

    def __init__(self, folder: Path, sample: SampleOptions, options: SourceOptions) -> None:
        """List the patches of all files.

        Raises:
            UserError: If no file has them, files differ in bands or sizes, or a file's bit depth is unknown.
        """
        self._notes: list[str] = []
        patches: list[Patch] = []
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        for path in sorted(_files(folder), key=lambda path: natural_key(path.name)):
            name = path.relative_to(folder).as_posix()
            status = path.stat()
            try:
                with _reading(name):
                    count, shapes = _checked(name, _open(path, status.st_size, status.st_mtime_ns))
            except UnusableError as error:
                self._notes.append(f"{name} was passed over: {error.detail}")
                continue
            if self._shapes not in (None, shapes):
                raise UserError(
                    f"--input {folder}: {name} holds patches of {_text(shapes)}, and others {_text(self._shapes)}: "
                    "shard files of one sensor and size at a time"
                )
            self._shapes = shapes
            file = PatchFile(path, name, status.st_size, options.bits or _bits(name), status.st_mtime_ns)
            stem = name.rpartition(".")[0]
            patches += [Patch(f"{stem}-{number:05d}", file, number) for number in range(count)]
        if self._shapes is None:
            why = f": {self._notes[0]}" if self._notes else ""
            raise UserError(
                f"--input {folder} holds no HDF5 file with ms, pan and gt{why}: give the folder of such files"
            )
        self.scenes: Sequence[Patch] = patches
        """Patches, file by file."""

    @property
    def notes(self) -> Sequence[str]:
        """Lines for the user."""
        return self._notes

    def facts(self, options: SampleOptions, layouts: Iterable[SampleLayout]) -> Facts:
        """Return the facts of a dataset of whole patches: each is one chip."""
        assert self._shapes is not None, "the constructor refuses a folder without patches"
        (bands, side, _), (_, high, _) = self._shapes
        names = BANDS.get(bands) or tuple(f"band{band}" for band in range(1, bands + 1))
        return fitted_facts("pancollection", Bands(names, names), (high // side, 1), options, layouts, side)

    def sample_bytes(self, options: SampleOptions) -> int:
        """Return the size of a sample in a shard, but for headers."""
        assert self._shapes is not None, "the constructor refuses a folder without patches"
        (bands, side, _), (_, high, _) = self._shapes
        return (bands * side**2 + (bands + 1) * high**2) * np.dtype(options.dtype).itemsize + side**2 + 5120

    def split_rows(self) -> list[tuple[str, str]] | None:
        """Return the split that the files' names tell (train, valid, test); None if one of them tells none."""
        splits = {patch.file.name: _split_of(patch.file.name) for patch in self.scenes}
        if None in splits.values() or not set(SPLITS[:1]) <= set(splits.values()):
            return None
        return [(patch.name, str(splits[patch.file.name])) for patch in self.scenes]


def _files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise UserError(f"--input {folder} is no folder: give the folder of the HDF5 files")
    for path in folder.rglob("*"):
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith("."):
            yield path


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UnusableError("unreadable", f"{name} is damaged or no HDF5 file ({error})") from error


@lru_cache(maxsize=8)
def _open(path: Path, size: int, changed: int) -> h5py.File:
    """Open a file once per process."""
    return h5py.File(path, "r")


def _checked(name: str, file: h5py.File) -> tuple[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the number of patches and the shapes of ms and gt, after a check of the arrays."""
    arrays: dict[str, h5py.Dataset] = {}
    for key in ("ms", "gt", "pan"):
        found = file.get(key, getlink=True)
        array = file.get(key) if isinstance(found, h5py.HardLink) else None
        if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external:
            raise UnusableError("missing-file", f"it holds no array {key!r} of its own")
        patch = int(np.prod(array.shape[1:])) * array.dtype.itemsize
        chunk = int(np.prod(array.chunks)) * array.dtype.itemsize if array.chunks else 0
        if array.ndim != 4 or array.dtype.kind not in "uif":
            raise UnusableError("wrong-type", f"{key} is {array.ndim}-dimensional {array.dtype}, patches are 4 numbers")
        if max(patch, chunk) > MAX_BYTES:
            raise UnusableError("absurd-size", f"{key} has patches or chunks of {max(patch, chunk)} bytes")
        arrays[key] = array
    ms, gt, pan = (arrays[key].shape for key in ("ms", "gt", "pan"))
    fits = ms[0] == gt[0] == pan[0] and ms[1] == gt[1] and pan[1] == 1 and gt[2:] == pan[2:]
    square = ms[2] == ms[3] and gt[2] == gt[3] and ms[2] > 0 and gt[2] % ms[2] == 0
    if not (fits and square):
        raise UnusableError("size-mismatch", f"ms {list(ms)}, gt {list(gt)} and pan {list(pan)} do not fit together")
    return int(ms[0]), (tuple(ms[1:]), tuple(gt[1:]))


def _bits(name: str) -> int:
    words = re.split(r"[^a-z0-9]+", Path(name).stem.lower())
    found = {bits for sensor, bits in BITS.items() if sensor in words}
    if len(found) != 1:
        raise UserError(f"{name} does not name its sensor ({', '.join(BITS)}): give the bits of a value by --bits")
    return found.pop()


def _split_of(name: str) -> str | None:
    match = re.match(r"[a-z]+", Path(name).name.lower())
    return SPLIT_NAMES.get(match[0]) if match else None


def _text(shapes: tuple[tuple[int, ...], tuple[int, ...]] | None) -> str:
    return " and ".join(str(list(shape)) for shape in shapes or ())
