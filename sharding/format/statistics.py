"""Statistics of a split's bands: counts of every stored value; their sum does not depend on the order."""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharding.format.entries import BandStatistics
from sharding.prepare.options import STEP

VALUES = 1 << 16
"""Number of values of a stored uint16."""

MOST_BANDS = 64
"""Limit of the bands of an image: a text must not take more memory than they do."""

PERCENTILES = (1, 2, 25, 50, 75, 98, 99)


@dataclass(frozen=True)
class Histogram:
    """Counts of each uint16 value in each band of an image."""

    counts: NDArray[np.uint64]
    """[C, 65536]."""

    @classmethod
    def of(cls, image: NDArray[np.uint16]) -> Histogram:
        """Count the values of an image [..., C, h, w] over all axes but C."""
        bands = np.moveaxis(image, -3, 0).reshape(image.shape[-3], -1)
        return cls(np.stack([np.bincount(band, minlength=VALUES) for band in bands]).astype(np.uint64))

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]

    def statistics(self) -> BandStatistics:
        """Return the statistics in reflectance; percentile p is the least value that p % of all do not exceed."""
        bands = [_Band.of(counts) for counts in self.counts]
        return {
            "mean": [STEP * band.total / band.count for band in bands],
            # Integers up to the last division: no cancellation between the mean square and the squared mean.
            "std": [STEP * ((band.count * band.squares - band.total**2) / band.count**2) ** 0.5 for band in bands],
            "min": [STEP * int(band.values[0]) for band in bands],
            "max": [STEP * int(band.values[-1]) for band in bands],
            "percentiles": {
                str(percent): [STEP * band.percentile(percent) for band in bands] for percent in PERCENTILES
            },
        }

    def to_text(self) -> str:
        """Return the counts as text for a JSON file, about 20 kB per band."""
        return base64.b64encode(zlib.compress(self.counts.astype("<u8").tobytes(), 1)).decode()

    @classmethod
    def from_text(cls, text: str) -> Histogram:
        """Parse the text of ``to_text``.

        Raises:
            ValueError: For another text, or more than ``MOST_BANDS`` bands.
        """
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(base64.b64decode(text, validate=True), MOST_BANDS * VALUES * 8)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if not data or not unpacker.eof:
            raise ValueError(f"it is cut short, or has more than {MOST_BANDS} bands")
        return cls(np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, VALUES))


@dataclass(frozen=True)
class _Band:
    """Values that occur in one band, and their counts."""

    values: NDArray[np.int64]
    counts: NDArray[np.uint64]
    count: int
    total: int
    squares: int

    @classmethod
    def of(cls, counts: NDArray[np.uint64]) -> _Band:
        values = np.flatnonzero(counts)
        pairs = [(value, count) for value, count in zip(values.tolist(), counts[values].tolist(), strict=True)]
        return cls(
            values=values,
            counts=counts[values],
            count=sum(count for _, count in pairs),
            total=sum(value * count for value, count in pairs),
            squares=sum(value * value * count for value, count in pairs),
        )

    def percentile(self, percent: int) -> int:
        rank = math.ceil(percent * self.count / 100)
        return int(self.values[np.searchsorted(np.cumsum(self.counts), rank)])
