"""The protocol of sources: a source yields scenes, and nothing past it knows a sensor.

A source lists `SceneFiles` without reading pixels. Each can be read by any process that sees the files, and becomes a
`Scene`: images in reflectance with masks, dates, georeference and radiometry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sharding.format.layout import Facts, SampleLayout
from sharding.prepare.options import SampleOptions

NO_CLM = 255
"""Value of a cloud mask where nothing is known."""

Bounds = tuple[float, float, float, float]
"""West, south, east, north."""

Corners = tuple[tuple[float, float], ...]
"""Longitude and latitude of the corners of a piece of land, in order around it."""


@dataclass(frozen=True)
class Revisit:
    """Metadata of one low-resolution image."""

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
    """Images of one scene in reflectance. PAN and target cover the land of the revisits."""

    aoi: str
    """Its name."""

    lr: NDArray[np.float32]
    """[R, C, h, w] reflectance of the candidate revisits; 0 where there is no data."""

    clm: NDArray[np.uint8]
    """[R, 1, h, w] cloud masks: 0 clear, 1 cloud, 255 no data, also where the source has no mask."""

    scl: tuple[NDArray[np.uint8] | None, ...]
    """Scene classification [1, h, w] per revisit; None if the source has none."""

    valid: NDArray[np.bool_]
    """[R, 1, h, w] mask of pixels with data."""

    hr: NDArray[np.float32]
    """[C, H, W] reflectance of the target; 0 where there is no data. [0, H, W] in a scene read without target."""

    hr_valid: NDArray[np.bool_]
    """[H, W] mask of the target's pixels with data."""

    pan: NDArray[np.float32]
    """[1, H, W] reflectance of the panchromatic image; 0 where there is no data."""

    pan_valid: NDArray[np.bool_]
    """[H, W] mask of its pixels with data."""

    rgb: tuple[int, int, int]
    """0-based positions of red, green and blue in ``lr``; they decide which revisit is the clearest."""

    labels: Mapping[str, tuple[str, ...]]
    """Names of the bands of ``lr``, ``hr`` and ``pan`` for messages."""

    titles: Mapping[str, str]
    """Names of ``hr`` and ``pan`` for messages, such as "the SPOT pan raster"."""

    revisits: tuple[Revisit, ...]
    """Metadata of each image of ``lr``."""

    hr_date: str | None
    """Day of the target."""

    crs: str | None
    """Coordinate system of ``bounds``, such as ``EPSG:4326``; None if unknown."""

    bounds: Bounds
    """West, south, east, north of the grids, which cover the same land."""

    land: Bounds | None
    """The same bounds in EPSG:4326; None if the coordinate system is unknown."""

    georeference: str
    """Origin of the georeference, in words."""

    facts: Mapping[str, object]
    """Facts of this source for the sample's JSON, such as its bands and radiometry."""

    sources: Mapping[str, str]
    """SHA-256, in hex, of every file that was read, by file name."""

    bytes_in: int
    """Total size of these files, or of the parts that were read."""

    limit: float | None = None
    """Reflectance to which target and PAN are clamped from above, and 0 from below; None clamps neither."""

    masked: bool = False
    """True if resizing leaves out pixels without data; otherwise their 0 takes part, as in the published pipeline."""

    keeps_valid: bool = False
    """True if the sample stores the pixels whose target and PAN hold data, see `sharding.format.layout.VALID`."""

    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Number of unusual values by kind and image, such as negative ones; kinds without any are absent."""


class FileName(Protocol):
    """A file of a source."""

    @property
    def name(self) -> str:
        """Name within the source."""
        ...

    @property
    def size(self) -> int:
        """Size in bytes."""
        ...


class SceneFiles(Protocol):
    """Files of one scene, or of one tile of it; none has been read. It can be pickled."""

    @property
    def name(self) -> str:
        """Name, unique in the source; the sample gets it."""
        ...

    @property
    def group(self) -> str:
        """Name of the group: all members of a group, such as the tiles of a scene, go into one split."""
        ...

    @property
    def footprint(self) -> Corners | None:
        """Corners of its land; None if they are unknown before the rasters are read."""
        ...

    @property
    def recipe(self) -> str:
        """Text of everything beside files and options that decides the scene's pixels; part of a shard's identity."""
        ...

    def used(self, options: SampleOptions, /) -> Sequence[FileName]:
        """Return the files that a sample with these options reads."""
        ...

    def spare(self, options: SampleOptions, /) -> Sequence[FileName]:
        """Return files of further revisits, which may stand in for unusable ones."""
        ...

    def without(self, number: int, /) -> SceneFiles:
        """Return the scene without one of its revisits."""
        ...

    def check(self, options: SampleOptions, /) -> None:
        """Check, without reading pixels, that a sample can be made.

        Raises:
            UnusableError: With the reason.
        """
        ...

    def read(self, options: SampleOptions, /) -> Scene:
        """Read the scene.

        Raises:
            UnusableError: For a raster that is damaged or does not fit.
        """
        ...


class Source(Protocol):
    """A folder of scenes."""

    @property
    def notes(self) -> Sequence[str]:
        """Lines for the user on what was found, such as files that were passed over."""
        ...

    @property
    def scenes(self) -> Sequence[SceneFiles]:
        """Scenes in natural order of their names, complete or not."""
        ...

    def facts(self, options: SampleOptions, layouts: Iterable[SampleLayout], /) -> Facts:
        """Return the facts of a dataset of samples with these options and layouts; none are known before sharding."""
        ...

    def sample_bytes(self, options: SampleOptions, /) -> int:
        """Return the approximate size of a sample in a shard."""
        ...

    def split_rows(self) -> list[tuple[str, str]] | None:
        """Return the rows (scene, split) of the source's own split; None if it has none.

        Raises:
            UserError: If its file cannot be read.
        """
        ...
