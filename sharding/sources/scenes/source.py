"""Scenes of a user's GeoTIFFs, cut into tiles on the PAN grid."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharding.errors import Reason, UnusableError, UserError
from sharding.format.layout import VALID, Bands, Facts, SampleLayout, fitted_facts, rgb_positions
from sharding.prepare.options import SampleOptions
from sharding.sources.options import SourceOptions
from sharding.sources.scenes.description import read_description
from sharding.sources.scenes.grid import Box, Grid, tiles
from sharding.sources.scenes.header import digest
from sharding.sources.scenes.layout import File, find_scenes
from sharding.sources.scenes.opened import Layer, Names, OpenedScene, Visit, open_scene
from sharding.sources.scenes.place import footprint
from sharding.sources.scenes.raster import Image, read_mask, read_on_grid
from sharding.sources.source import NO_CLM, Bounds, Corners, Revisit, Scene

TILE_LR = 150
"""Least side of a default tile on the LR grid: three chips of 50."""

GEOREFERENCE = "the panchromatic raster's grid; all images were brought onto it by their georeferences"

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class TileFiles:
    """One tile of a scene; implements `sharding.sources.source.SceneFiles`."""

    name: str
    """Name of the scene, with the tile's first column and row if it has several."""

    group: str
    """Name of the scene, or of the block of land in which the tile lies."""

    footprint: Corners | None
    """Corners of its land."""

    box: Box
    """PAN pixels of the tile."""

    scene: OpenedScene | None
    """The scene; None if its headers are unusable."""

    flaw: tuple[Reason, str] | None = None
    """Reason why the scene is unusable."""

    few_revisits: str = "drop"
    """``drop`` or ``repeat``, see `SourceOptions`."""

    target: bool = True
    """Whether the target is read; a prediction has none."""

    @property
    def recipe(self) -> str:
        """Text of everything beside files and options that decides the pixels."""
        scene = self.scene
        if scene is None:
            return ""
        layers = [visit.layer for visit in scene.visits] + [scene.pan, scene.target]
        read = [[layer.bands, layer.names, vars(layer.radiometry)] for layer in layers]
        dates = [scene.pan_date, *(visit.date for visit in scene.visits)]
        grid = [*scene.place.grid.transform, scene.place.grid.crs]
        masks = {(visit.mask.cloud, visit.mask.unknown) for visit in scene.visits if visit.mask} or {((1,), (NO_CLM,))}
        meanings = [values for meaning in sorted(masks) for values in meaning]
        return json.dumps([VALID, read, dates, grid, self.box, str(scene.ratio), *meanings])

    def used(self, options: SampleOptions) -> tuple[File, ...]:
        """Return the files that a sample with these options reads."""
        if self.scene is None:
            return ()
        files = [*self.scene.pan.files, *self.scene.target.files]
        for visit in self._candidates(options):
            files += visit.files
        return tuple(sorted(set(files), key=lambda file: file.name))

    def spare(self, options: SampleOptions) -> tuple[File, ...]:
        """Return the files of revisits that a sample with these options does not read."""
        if self.scene is None:
            return ()
        used = set(self.used(options))
        return tuple(file for visit in self.scene.visits for file in visit.files if file not in used)

    def without(self, number: int) -> TileFiles:
        """Return the tile without one of its revisits."""
        assert self.scene is not None, "a scene without revisits is refused before it is read"
        visits = tuple(visit for visit in self.scene.visits if visit.number != number)
        return replace(self, scene=replace(self.scene, visits=visits))

    def check(self, options: SampleOptions) -> None:
        """Check, without reading pixels, that a sample can be made.

        Raises:
            UnusableError: With the reason.
        """
        if self.flaw is not None:
            raise UnusableError(*self.flaw)
        assert self.scene is not None
        found = len(self.scene.visits)
        if found < (1 if self.few_revisits == "repeat" else options.revisits):
            raise UnusableError(
                "too-few-revisits",
                f"{found} revisits where {options.revisits} are needed: give --revisits {found}, or --few-revisits "
                "repeat",
            )

    def read(self, options: SampleOptions) -> Scene:
        """Read the tile's pixels.

        Raises:
            UnusableError: For a raster that is damaged.
        """
        scene = self.scene
        assert scene is not None, "check() refuses it"
        grid = scene.place.grid.part(self.box)
        coarse = grid.coarser(scene.ratio)
        whole = scene.place.grid
        counts: dict[str, int] = {}

        def read(image: str, layer: Layer, on: Grid) -> Image:
            pixels, limit = read_on_grid(layer.header.over(whole), layer.bands, layer.radiometry, on)
            counts[image] = counts.get(image, 0) + limit
            return pixels

        visits = self._candidates(options)
        lr = np.stack([read("lr", visit.layer, coarse) for visit in visits])
        pan = read("pan", scene.pan, grid)
        hr = read("hr", scene.target, grid) if self.target else np.empty((0, *pan.shape[1:]), np.float32)
        valid = _seen(lr)
        clm = np.stack([self._mask(visit, coarse) for visit in visits])
        clm[~valid] = NO_CLM
        hr_valid, pan_valid = _seen(hr)[0], _seen(pan)[0]
        files = self.used(options)
        layers = {"lr": scene.visits[0].layer, "hr": scene.target, "pan": scene.pan}
        return Scene(
            aoi=self.name,
            lr=np.nan_to_num(lr, copy=False, nan=0.0),
            clm=clm,
            scl=(None,) * len(visits),
            valid=valid,
            hr=np.nan_to_num(hr, copy=False, nan=0.0),
            hr_valid=hr_valid,
            pan=np.nan_to_num(pan, copy=False, nan=0.0),
            pan_valid=pan_valid,
            rgb=rgb_positions(scene.visits[0].layer.names),
            labels={image: band_names(layer.names) for image, layer in layers.items()},
            titles={"hr": scene.target.header.title, "pan": scene.pan.header.title},
            revisits=tuple(
                Revisit(visit.number, visit.date, _cover(mask), bool(visit.mask))
                for visit, mask in zip(visits, clm, strict=True)
            ),
            hr_date=scene.pan_date,
            crs=grid.crs,
            bounds=grid.bounds,
            land=land_of(self.footprint),
            georeference=GEOREFERENCE,
            facts={
                "scene": scene.name,
                "tile": list(self.box),
                "bands": list(band_names(layers["lr"].names)),
                "ratio": [scene.ratio.numerator, scene.ratio.denominator],
                "radiometry": {image: _radiometry(layer) for image, layer in layers.items()},
                **_processing(visits),
            },
            sources={file.name: digest(file) for file in files},
            bytes_in=lr.nbytes + hr.nbytes + pan.nbytes,
            keeps_valid=True,
            counts={"at_limit": {image: count for image, count in counts.items() if count}},
        )

    def _candidates(self, options: SampleOptions) -> tuple[Visit, ...]:
        assert self.scene is not None
        visits = self.scene.visits
        return visits[: options.revisits] if options.select == "first" else visits

    def _mask(self, visit: Visit, grid: Grid) -> NDArray[np.uint8]:
        assert self.scene is not None
        if visit.mask is None:
            return np.full((1, grid.height, grid.width), NO_CLM, np.uint8)
        placed = replace(visit.mask, header=visit.mask.header.over(self.scene.place.grid))
        return read_mask(placed, grid, NO_CLM)[None]


class ScenesSource:
    """A folder of GeoTIFFs with a ``scenes.toml``; implements `sharding.sources.source.Source`."""

    def __init__(self, folder: Path, sample: SampleOptions, options: SourceOptions) -> None:
        """Read the description and all headers; the options of samples have no part in it.

        Raises:
            UserError: If the description is missing or wrong, or --tile does not fit the ratio.
        """
        self._description = read_description(folder)
        self._options = options
        scenes: list[TileFiles] = []
        self._first: OpenedScene | None = None
        versions: set[tuple[str, float]] = set()
        for found in find_scenes(folder, self._description):
            try:
                scene = open_scene(found, self._description, self._first)
            except UnusableError as error:
                scenes.append(
                    TileFiles(found.name, found.name, None, Box(0, 0, 0, 0), None, (error.reason, error.detail))
                )
                continue
            self._first = self._first or scene
            scenes += self._tiles(scene)
            versions |= {(visit.layer.header.processing or "", _offset(visit)) for visit in scene.visits}
        self.notes: Sequence[str] = _mixed(versions)
        """Lines for the user."""
        self.scenes: Sequence[TileFiles] = scenes
        """Tiles of all scenes; one without tiles for an unusable scene."""

    def facts(self, options: SampleOptions, layouts: Iterable[SampleLayout]) -> Facts:
        """Return the facts of a dataset of tiles with these layouts."""
        first = self._first
        assert first is not None, "a dataset has a usable scene"
        bands = Bands(band_names(first.visits[0].layer.names), band_names(first.target.names))
        ratio = first.ratio.numerator, first.ratio.denominator
        return fitted_facts("scenes", bands, ratio, options, layouts, self._options.chip, masks=("clm", "valid"))

    def sample_bytes(self, options: SampleOptions) -> int:
        """Return the approximate size of a tile's sample."""
        first = self._first
        if first is None:
            return 1  # the plan refuses a source without usable scenes
        side, bands = tile_side(first.ratio, self._options.tile), len(first.target.bands)
        hr, lr = side**2, (side / float(first.ratio)) ** 2
        values = round(options.revisits * bands * lr + (bands + 1) * hr)
        return values * np.dtype(options.dtype).itemsize + round(options.revisits * lr + hr)

    def split_rows(self) -> None:
        """Return None: a user's scenes have no published split."""

    def _tiles(self, scene: OpenedScene) -> list[TileFiles]:
        """Return the tiles of a scene."""
        side = tile_side(scene.ratio, self._options.tile)
        overlap = self._options.overlap // scene.ratio.numerator * scene.ratio.numerator
        if overlap >= side:
            raise UserError(f"--overlap {self._options.overlap} leaves nothing of tiles of {side} px: give less")
        by_block = self._options.split_by == "block"
        boxes = list(tiles(scene.place.area, side, overlap, scene.ratio, scene.place.anchor, apart=by_block))
        area, (wide, high) = scene.place.area, scene.place.least
        # A strip that images barely share would set the chips of the whole dataset.
        narrow = 2 * area.width < min(side, wide) or 2 * area.height < min(side, high)
        if not boxes or narrow:
            least = f"the least is {scene.ratio.numerator}"
            if narrow:
                least = f"less than half of a tile ({side} px) and of the smallest image ({wide:.0f} x {high:.0f})"
            flaw: tuple[Reason, str] = (
                "no-overlap",
                f"its images share {area.width} x {area.height} PAN pixels, {least}",
            )
            return [TileFiles(scene.name, scene.name, None, Box(0, 0, 0, 0), None, flaw)]
        found = []
        for box in boxes:
            corners = footprint(scene.place.grid.part(box))
            name = scene.name if len(boxes) == 1 else f"{scene.name}_x{box.x}_y{box.y}"
            group = scene.name
            if by_block:
                if corners is None:
                    raise UserError(f"--split-by block needs coordinates, and scene {scene.name!r} has none")
                group = block_of(corners, self._options.block_km)
            few = self._options.few_revisits
            found.append(TileFiles(name, group, corners, box, scene, few_revisits=few))
        return found


def tile_side(ratio: Fraction, wanted: int | None) -> int:
    """Return the side of a tile in PAN pixels; it has whole pixels on both grids.

    Raises:
        UserError: If the wanted side has none; the message names the nearest ones.
    """
    unit = ratio.numerator
    if wanted is None:
        return math.ceil(TILE_LR / ratio.denominator) * unit
    if wanted % unit:
        low, high = wanted // unit * unit, (wanted // unit + 1) * unit
        near = f"{low} or {high}" if low else str(high)
        raise UserError(f"--tile {wanted} is no whole number of LR pixels at a ratio of {ratio}: give {near}")
    return wanted


def land_of(corners: Corners | None) -> Bounds | None:
    """Return the bounds of corners."""
    if corners is None:
        return None
    xs, ys = zip(*corners, strict=True)
    west, south, east, north = (round(value, 9) for value in (min(xs), min(ys), max(xs), max(ys)))
    return west, south, east, north


def block_of(corners: Corners, side_km: float) -> str:
    """Return the name of the block of land that holds the middle of these corners."""
    longitude, latitude = (sum(values) / len(corners) for values in zip(*corners, strict=True))
    degree = 111.32  # km on the equator
    row = math.floor(latitude * degree / side_km)
    wide = max(0.01, math.cos(math.radians(row * side_km / degree)))
    return f"block {math.floor(longitude * degree * wide / side_km)} {row}"


def band_names(names: Names) -> tuple[str, ...]:
    """Return a name for each band: its number if it has none."""
    return tuple(name or f"band{number}" for number, name in enumerate(names, start=1))


def _seen(image: Image) -> Mask:
    """Return the mask [..., 1, h, w] of pixels of an image [..., C, h, w] with data in all bands."""
    return np.asarray(~np.isnan(image).any(axis=-3, keepdims=True))


def _cover(mask: NDArray[np.uint8]) -> float | None:
    known = mask[mask != NO_CLM]
    return round(100 * float((known == 1).mean()), 2) if known.size else None


def _offset(visit: Visit) -> float:
    return visit.layer.radiometry.of(visit.layer.header, visit.layer.bands[0])[1]


def _processing(visits: Sequence[Visit]) -> dict[str, object]:
    """Return version and offset of each candidate revisit, if any is a product that tells its version."""
    versions = [visit.layer.header.processing for visit in visits]
    return {"processing": versions, "offsets": [_offset(visit) for visit in visits]} if any(versions) else {}


def _mixed(versions: Collection[tuple[str, float]]) -> list[str]:
    """Return a line for the user if revisits have several versions of processing."""
    if len({name for name, _ in versions}) < 2:
        return []
    each = ", ".join(f"{name or 'unknown'} (offset {offset:g})" for name, offset in sorted(versions))
    return [f"revisits of several versions are mixed, and each is converted by its own offset: {each}"]


def _radiometry(layer: Layer) -> Mapping[str, object]:
    """Return scale, offset and value without data: one number, or one per band where they differ."""
    found = zip(*(layer.radiometry.of(layer.header, band) for band in layer.bands), strict=True)
    named = {name: [*map(_plain, values)] for name, values in zip(("scale", "offset", "nodata"), found, strict=True)}
    return {name: values[0] if len(set(values)) == 1 else values for name, values in named.items()}


def _plain(value: float | None) -> float | str | None:
    """Return a number as JSON has it."""
    return value if value is None or math.isfinite(value) else "nan"
