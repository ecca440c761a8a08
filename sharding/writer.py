"""Samples to one tar file whose bytes depend on nothing but the samples, and that file's line of the index."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from numpy.typing import NDArray

from sharding.schema import (
    JSON_SUFFIX,
    STEP,
    BandStatistics,
    SampleEntry,
    ShardEntry,
    aoi_of,
    key_of,
)


@dataclass(frozen=True)
class NewSample:
    """A sample to be written."""

    aoi: str
    """The AOI's name."""

    images: Mapping[str, NDArray[np.generic]]
    """``lr``, ``clm``, ``hr``, ``pan``."""

    meta: Mapping[str, object]
    """The JSON."""

    bytes_in: int = 0
    """Length of the source files that it was made from."""


@dataclass(frozen=True)
class BandSums:
    """Exact sums over integers, one a band. Adding them in any order gives the same statistics."""

    count: int
    """Values a band."""

    total: tuple[int, ...]
    """Sum of the values."""

    squares: tuple[int, ...]
    """Sum of their squares."""

    low: tuple[int, ...]
    """Least value."""

    high: tuple[int, ...]
    """Greatest value."""

    @classmethod
    def of(cls, image: NDArray[np.generic]) -> BandSums:
        """Sum an image [..., C, h, w] over all axes but C."""
        bands = np.moveaxis(image, -3, 0).reshape(image.shape[-3], -1).astype(np.uint64)

        def integers(values: NDArray[np.uint64]) -> tuple[int, ...]:
            return tuple(map(int, values))

        return cls(
            count=bands.shape[1],
            total=integers(bands.sum(1)),
            squares=integers((bands * bands).sum(1)),
            low=integers(bands.min(1)),
            high=integers(bands.max(1)),
        )

    def __add__(self, other: BandSums) -> BandSums:
        return BandSums(
            count=self.count + other.count,
            total=tuple(a + b for a, b in zip(self.total, other.total, strict=True)),
            squares=tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
            low=tuple(map(min, self.low, other.low)),
            high=tuple(map(max, self.high, other.high)),
        )

    def statistics(self) -> BandStatistics:
        """Return the statistics in reflectance."""
        # Whole numbers up to the last division: no cancellation between the square of the mean and the mean square.
        pairs = zip(self.total, self.squares, strict=True)
        variance = [(self.count * squares - total**2) / self.count**2 for total, squares in pairs]
        return {
            "mean": [STEP * total / self.count for total in self.total],
            "std": [STEP * value**0.5 for value in variance],
            "min": [STEP * value for value in self.low],
            "max": [STEP * value for value in self.high],
        }


def write_tar(path: Path, samples: Iterable[NewSample]) -> None:
    """Write samples as WebDataset does: equal samples give equal bytes, whoever writes them and when."""
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            members = {f"{name}.npy": _npy(image) for name, image in sample.images.items()}
            members[JSON_SUFFIX] = json.dumps(sample.meta, sort_keys=True).encode()
            tar.write({"__key__": key_of(sample.aoi), **members})


def describe_tar(path: Path, name: str) -> ShardEntry:
    """Read a tar back and return its line of the index under the key ``name``.

    Read, not remembered: the index then says what is in the file, whatever the writing library does.
    """
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        end_of_last = tar.offset
    groups: dict[str, list[tarfile.TarInfo]] = {}
    for member in members:
        groups.setdefault(member.name.partition(".")[0], []).append(member)
    starts = [group[0].offset for group in groups.values()]
    # A sample ends where the next begins, the last one where the tar's closing zeros do.
    ends = [*starts[1:], end_of_last]
    digest = hashlib.sha256()
    samples = []
    with path.open("rb") as file:
        for (key, group), start, end in zip(groups.items(), starts, ends, strict=True):
            span = file.read(end - start)
            digest.update(span)
            spans = {member.name.partition(".")[2]: (member.offset_data - start, member.size) for member in group}
            samples.append(SampleEntry(key, aoi_of(key), start, len(span), zlib.crc32(span), spans))
        digest.update(file.read())
    return ShardEntry(name, path.stat().st_size, digest.hexdigest(), tuple(samples))


def _npy(image: NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(image), allow_pickle=False)
    return buffer.getvalue()
