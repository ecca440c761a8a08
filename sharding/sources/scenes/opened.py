"""Scenes whose headers are read and compared: which bands of which files, where, and in which units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from sharding.errors import UnusableError
from sharding.sources.bands import SYNONYMS, check_same, choose_bands
from sharding.sources.scenes.description import Description, Images
from sharding.sources.scenes.header import CloudMask, Header, Radiometry
from sharding.sources.scenes.layout import File, FoundScene
from sharding.sources.scenes.place import Place, place_scene, scene_ratio
from sharding.sources.scenes.products.read import read_header

Names = tuple[str | None, ...]


@dataclass(frozen=True)
class Layer:
    """An image of a scene, ready to be read."""

    header: Header
    """Its header."""
    bands: tuple[int, ...]
    """Bands that are read, from 1."""
    names: Names
    """Common names of these bands; None if unknown."""
    radiometry: Radiometry
    """Conversion to reflectance."""

    @property
    def files(self) -> tuple[File, ...]:
        """Files that decide its pixels."""
        return self.header.files(self.bands)


@dataclass(frozen=True)
class Visit:
    """A revisit, ready to be read."""

    number: int
    """Its number in the scene, from 1."""
    layer: Layer
    """Its image."""
    mask: CloudMask | None
    """Its cloud mask."""
    date: str | None
    """Its day."""

    @property
    def files(self) -> list[File]:
        """Its files."""
        mask = self.mask.header.files(self.mask.bands) if self.mask else ()
        return [*self.layer.files, *mask]


@dataclass(frozen=True)
class OpenedScene:
    """A scene whose headers are read."""

    name: str
    """Its name."""
    visits: tuple[Visit, ...]
    """Its revisits, in order."""
    pan: Layer
    """Its panchromatic image."""
    target: Layer
    """Its target."""
    place: Place
    """Its place on land."""
    ratio: Fraction
    """PAN pixels per LR pixel."""
    pan_date: str | None
    """Day of its panchromatic image."""


def open_scene(found: FoundScene, told: Description, first: OpenedScene | None) -> OpenedScene:
    """Read the headers of a scene, and compare them with each other and with the first scene's.

    Raises:
        UnusableError: If they do not fit together.
    """
    if found.pan is None or found.target is None or not found.revisits:
        lacking = "a panchromatic image" if found.pan is None else "a target" if found.target is None else "revisits"
        raise UnusableError("missing-file", f"it has no {lacking.removeprefix('a ')}: see scenes.toml")
    headers = [read_header(visit.image) for visit in found.revisits]
    pan_header, target_header = read_header(found.pan), read_header(found.target)
    wanted, theirs = told.revisits.bands, told.target.bands
    if wanted is None and theirs is None:
        wanted = theirs = _common(headers[0], told.revisits, target_header, told.target)
    days = [
        visit.date or told.revisits.date or header.date for visit, header in zip(found.revisits, headers, strict=True)
    ]
    layers = [
        layer_of(header, _dated(told.revisits, day, header), wanted) for header, day in zip(headers, days, strict=True)
    ]
    target = layer_of(target_header, told.target, theirs)
    for layer, images, kind in ((layers[0], told.revisits, "revisits"), (target, told.target, "target")):
        if len(layer.bands) > 1 and images.bands is None and None in layer.names:
            raise UnusableError(
                "wrong-bands",
                f"{layer.header.title} does not name its {len(layer.bands)} bands, which are never paired by position: "
                f'give their names, such as order = ["red", "green", "blue"], below [{kind}], or numbers as `bands`',
            )
    for layer in layers[1:]:
        check_same(layer.header.title, layer.names, layers[0].header.title, layers[0].names)
    check_same(target.header.title, target.names, layers[0].header.title, layers[0].names)
    pan = layer_of(pan_header, told.pan, told.pan.bands)
    if len(pan.bands) != 1:
        raise UnusableError("wrong-bands", f"{pan.header.title} has {len(pan.bands)} bands: choose one by pan.bands")
    place = place_scene(pan.header, target.header, headers)
    scene = OpenedScene(
        name=found.name,
        visits=tuple(
            Visit(
                number,
                layer,
                CloudMask(read_header(visit.mask), told.masks.cloud, told.masks.unknown)
                if visit.mask
                else layer.header.mask,
                day,
            )
            for number, (visit, layer, day) in enumerate(zip(found.revisits, layers, days, strict=True), start=1)
        ),
        pan=pan,
        target=target,
        place=place,
        ratio=scene_ratio(place.measured, told.ratio or (float(first.ratio) if first else None)),
        pan_date=found.pan_date or told.pan.date or pan.header.date,
    )
    if first is not None:
        check_same(found.name, layers[0].names, first.name, first.visits[0].layer.names)
    return scene


def _dated(told: Images, day: str | None, header: Header) -> Images:
    """Return the description of a revisit of this day: without offset before the day that the user gives for it."""
    if told.offset_since is None:
        return told
    if day is None:
        raise UnusableError("no-date", f"{header.title} has no date, which `offset_since` needs")
    return told if day >= told.offset_since else replace(told, offset=0.0)


def layer_of(header: Header, told: Images, wanted: Sequence[int | str] | None) -> Layer:
    """Choose the bands of an image and their conversion.

    Raises:
        UnusableError: If bands do not exist, contradict their names, or nothing tells their reflectance.
    """
    bands, names = choose_bands(header.title, header.names, told.order, wanted)
    if told.nodata is not None and len(told.nodata) not in (1, len(header.names)):
        raise UnusableError(
            "wrong-bands", f"{header.title} has {len(header.names)} bands, and `nodata` has {len(told.nodata)} values"
        )
    if header.calibration:
        header = calibrated(header, told.order)
    if header.flaw is not None and None in (told.scale, told.offset):
        raise UnusableError("implausible", f"{header.title} {header.flaw}: give `scale` and `offset` of its values")
    return Layer(header, bands, names, Radiometry(told.scale, told.offset, told.nodata))


def calibrated(header: Header, order: Sequence[str] | None) -> Header:
    """Return a header with the scales and offsets of its bands by their names, by the file or the description."""
    _, names = choose_bands(header.title, header.names, order, None)
    found = [header.calibration.get(name or "") for name in names]
    every = set(header.calibration.values())
    if None in found and len(every) == 1:
        found = [*every] * len(names)  # equal for all bands, so it does not matter which is which
    if None in found:
        return replace(header, flaw="does not say which of its bands is which, and they differ in their gains")
    scales, offsets = zip(*(pair for pair in found if pair is not None), strict=True)
    return replace(header, scales=scales, offsets=offsets)


def _common(header: Header, told: Images, target: Header, theirs: Images) -> tuple[str, ...] | None:
    """Return the bands that revisits and target share by name; None if one does not name all its bands."""
    mine = choose_bands(header.title, header.names, told.order, None)[1]
    yours = choose_bands(target.title, target.names, theirs.order, None)[1]
    if not all(name in SYNONYMS for name in (*mine, *yours)):
        return None
    return tuple(name for name in mine if name in yours) or None  # type: ignore[misc]
