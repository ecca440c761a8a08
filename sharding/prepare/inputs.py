"""Inputs of a prediction: a scene without its target, on the grids of its sample, from a source or from a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from sharding.errors import RevisitError, UnusableError
from sharding.format.layout import rgb_positions, worldstrat_facts
from sharding.format.sample import Sample
from sharding.prepare.options import SampleOptions
from sharding.prepare.sample import check_pictures, cloud_percent, grid_transform, stored_images
from sharding.prepare.scene import choose_revisits, prepare_inputs
from sharding.sources.scenes.source import TileFiles
from sharding.sources.source import Scene
from sharding.sources.worldstrat.layout import AoiFiles, check_files
from sharding.sources.worldstrat.rasters import read_scene

Stored = NDArray[Any]
Files = TypeVar("Files", AoiFiles, TileFiles)

_DESCRIBED = ("hr_date", "level", "bands", "revisits", "sources")
"""Parts of a sample's JSON that describe its inputs."""


@dataclass(frozen=True)
class SceneInput:
    """Revisits and PAN of one scene, with their place on the ground."""

    aoi: str
    """Name of the AOI."""

    lr: Stored
    """[R, C, h, w] revisits as a sample stores them."""

    pan: Stored
    """[1, H, W] panchromatic image as a sample stores it; 0 is no data."""

    step: float
    """Reflectance of a stored value of 1."""

    clearest: int
    """Clearest revisit, 0-based."""

    crs: str | None
    """Coordinate system, such as ``EPSG:4326``; None if unknown."""

    transform: tuple[float, ...]
    """(a, b, c, d, e, f) from a pixel of PAN to the CRS."""

    bands: tuple[str, ...]
    """Name of each band of the revisits, and so of the fused image."""

    provenance: Mapping[str, object]
    """Dates, revisits and the SHA-256 of each source file."""

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Return the 0-based positions of red, green and blue among the bands."""
        return rgb_positions(self.bands)

    def digest(self) -> str:
        """Return the SHA-256, in hex, of all pixels, their shapes and the georeference."""
        found = hashlib.sha256(repr((self.step, self.clearest, self.crs, self.transform)).encode())
        for image in (self.lr, self.pan):
            found.update(repr((image.dtype.str, image.shape)).encode())
            found.update(np.ascontiguousarray(image).data)
        return found.hexdigest()

    def valid(self, first: int, stop: int) -> NDArray[np.bool_]:
        """Return the mask [n, W] of the pixels with data, of the rows ``first`` to ``stop`` of PAN.

        A pixel has data if PAN has, there and in the eight pixels around it, which resizing may have mixed with a
        border without data, and if one revisit has.
        """
        height, width = self.pan.shape[-2:]
        above, below = max(0, first - 1), min(height, stop + 1)
        seen = np.pad(self.pan[0, above:below] != 0, ((above - first + 1, stop + 1 - below), (1, 1)), mode="edge")
        rows = seen[:-2] & seen[1:-1] & seen[2:]
        clear = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
        down, across = (
            ((np.arange(*where) + 0.5) * low / high).astype(np.intp)
            for where, low, high in zip(((first, stop), (0, width)), self.lr.shape[-2:], (height, width), strict=True)
        )
        lit = (self.lr[:, :, down[0] : down[-1] + 1] != 0).any(axis=(0, 1))
        return np.asarray(clear & lit[down - down[0]][:, across])


def read_input(aoi: AoiFiles, options: SampleOptions) -> SceneInput:
    """Read and prepare an AOI's revisits and PAN as for a sample; no target is needed.

    As for a sample, a revisit that shows nothing or has another size is passed over if enough others remain.

    Args:
        aoi: Its files, which pass ``check_files`` without target.
        options: Options of the samples that the network was trained on.

    Raises:
        UnusableError: If it cannot be read, or an image shows nothing.
    """
    provenance: dict[str, object] = {"level": options.level, "bands": list(options.band_numbers)}

    def read(of: AoiFiles) -> SceneInput:
        scene = read_scene(of, options, target=False)
        return _input(scene, options, worldstrat_facts(options).bands.lr, provenance)

    return _passing(aoi, read, lambda of: check_files(of, options, target=False))


def read_whole_scene(scene: TileFiles, options: SampleOptions, bands: tuple[str, ...]) -> SceneInput:
    """Read a user's whole scene as `read_input` reads an AOI; ``bands`` are the names of the revisits' bands.

    Raises:
        UnusableError: Like `read_input`.
    """
    scene.check(options)
    read = partial(_whole_input, options=options, bands=bands)
    return _passing(scene, read, lambda of: of.check(options))


def _whole_input(scene: TileFiles, options: SampleOptions, bands: tuple[str, ...]) -> SceneInput:
    return _input(scene.read(options), options, bands, {"bands": list(bands)})


def _passing(files: Files, read: Callable[[Files], SceneInput], check: Callable[[Files], None]) -> SceneInput:
    """Read a scene; revisits that show nothing are passed over while ``check`` accepts what remains."""
    first: RevisitError | None = None
    while True:
        try:
            return read(files)
        except RevisitError as error:
            first = first or error
            files = files.without(error.number)
            try:
                check(files)
            except UnusableError:
                raise first from None


def _input(
    scene: Scene, options: SampleOptions, bands: tuple[str, ...], provenance: Mapping[str, object]
) -> SceneInput:
    chosen = choose_revisits(scene, options)
    check_pictures(scene, chosen.revisits)
    lr, pan = prepare_inputs(scene, chosen.revisits, options)
    images, _ = stored_images({"lr": lr, "pan": pan}, options)
    return SceneInput(
        aoi=scene.aoi,
        lr=images["lr"],
        pan=images["pan"],
        step=options.step,
        clearest=chosen.clearest,
        crs=scene.crs,
        transform=tuple(grid_transform(scene.bounds, *pan.shape[-2:])),
        bands=bands,
        provenance={
            "hr_date": scene.hr_date,
            **provenance,
            "revisits": [
                {**vars(scene.revisits[index]), "cloud_percent": cloud_percent(scene, index)}
                for index in chosen.revisits
            ],
            "sources": dict(scene.sources),
        },
    )


def sample_input(sample: Sample, bands: tuple[str, ...]) -> SceneInput:
    """Return the revisits and PAN of a dataset's sample; ``bands`` are the dataset's names of the revisits' bands.

    Raises:
        UnusableError: ``no-data`` for a PAN without a pixel of data.
    """
    meta = cast(Mapping[str, Any], sample.meta)
    if not sample.pan.any():
        raise UnusableError("no-data", f"the PAN of {sample.aoi} is all zero")
    return SceneInput(
        aoi=sample.aoi,
        lr=sample.lr,
        pan=sample.pan,
        step=meta["step"],
        clearest=meta["clearest"],
        crs=meta["crs"],
        transform=tuple(meta["pan_transform"]),
        bands=bands,
        provenance={name: meta[name] for name in _DESCRIBED if name in meta},
    )
