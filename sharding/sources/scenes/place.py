"""Place of a scene's images: the PAN's grid, the ratio of pixels, and the area that all images cover."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from rasterio.crs import CRS
from rasterio.warp import calculate_default_transform

from sharding.errors import UnusableError
from sharding.sources.scenes.grid import RATIO_TOLERANCE, Box, Grid, nice_ratio
from sharding.sources.scenes.header import Header
from sharding.sources.scenes.raster import edge, to_crs
from sharding.sources.source import Bounds, Corners

EARTH_KM = 6371.0
SHEARED = 0.5
"""Share of an image's bounding box that its inner rectangle must have to be used instead."""


@dataclass(frozen=True)
class Place:
    """Place of a scene."""

    grid: Grid
    """Grid of its PAN, north-up."""

    area: Box
    """Pixels of this grid that all images cover."""

    measured: float
    """PAN pixels per LR pixel, as measured."""

    anchor: tuple[float, float]
    """Column and row, in PAN pixels, of the first corner of a revisit's pixels."""

    least: tuple[float, float]
    """Least width and height of an image, PAN pixels."""


def place_scene(pan: Header, target: Header, revisits: Sequence[Header]) -> Place:
    """Find the place of a scene's images.

    Images without a georeference are taken as covering the same land as the others if their sizes allow it.

    Raises:
        UnusableError: If images do not meet, or one lacks a georeference that it needs.
    """
    grid = pan_grid(pan, revisits[0])
    others = [target, *revisits]
    for header in others:
        _check_placed(header, grid, pan)
    # PAN too: one that is turned or in another coordinate system does not fill its grid.
    boxes = {header.title: covered(header.over(grid), grid) for header in (pan, *others)}
    _check_meet(grid, {header.title: header for header in (pan, *others)}, boxes)
    left, top = max(0, *(box[0] for box in boxes.values())), max(0, *(box[1] for box in boxes.values()))
    right = min(grid.width, *(box[2] for box in boxes.values()))
    bottom = min(grid.height, *(box[3] for box in boxes.values()))
    # A tenth of a pixel at an edge is rounding of georeferences, not land.
    x, y = math.ceil(left - 0.1), math.ceil(top - 0.1)
    area = Box(x, y, math.floor(right + 0.1) - x, math.floor(bottom + 0.1) - y)
    if area.width < 1 or area.height < 1:
        raise UnusableError("no-overlap", "its images have no land in common")
    first = revisits[0].over(grid)
    least = min(box[2] - box[0] for box in boxes.values()), min(box[3] - box[1] for box in boxes.values())
    return Place(grid, area, _ratio(first, grid), _anchor(first, grid), least)


def pan_grid(pan: Header, revisit: Header) -> Grid:
    """Return the north-up grid of PAN pixels; in the revisits' coordinate system if PAN's is in degrees."""
    if pan.transform is None:
        across, down = pan.width / revisit.width, pan.height / revisit.height
        if abs(across / down - 1) > 1.5 / min(revisit.width, revisit.height):
            raise UnusableError(
                "no-georeference",
                f"{pan.title} has no georeference, and its {pan.width} x {pan.height} px are not the shape of "
                f"{revisit.title} with {revisit.width} x {revisit.height} px",
            )
        if revisit.transform is not None and revisit.is_north_up:
            a, _, c, _, e, f = revisit.transform
            step_x, step_y = a * revisit.width / pan.width, -e * revisit.height / pan.height
            return Grid(revisit.crs, c, f, step_x, step_y, pan.width, pan.height)
        return Grid(None, 0.0, float(pan.height), 1.0, 1.0, pan.width, pan.height)
    degrees = pan.crs is not None and CRS.from_string(pan.crs).is_geographic
    metric = revisit.crs is not None and not CRS.from_string(revisit.crs).is_geographic
    a, b, c, d, e, f = pan.transform
    if not (degrees and metric) and b == d == 0:  # rows may run north
        west, north = min(c, c + a * pan.width), max(f, f + e * pan.height)
        return Grid(pan.crs, west, north, abs(a), abs(e), pan.width, pan.height)
    xs, ys = edge((0.0, float(pan.height), float(pan.width), 0.0))
    corners = [pan.affine @ (x, y) for x, y in zip(xs, ys, strict=True)]
    target = revisit.crs if degrees and metric else pan.crs
    xs, ys = to_crs(pan.crs, target, [x for x, _ in corners], [y for _, y in corners])  # type: ignore[assignment]
    step = math.sqrt(abs(a * e - b * d))
    if target != pan.crs:
        step = _step_in(pan, target)
    west, north = min(xs), max(ys)
    return Grid(target, west, north, step, step, round((max(xs) - west) / step), round((north - min(ys)) / step))


def covered(header: Header, grid: Grid) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of an image in pixels of a grid: a rectangle within the image if it is
    nearly upright there, else its bounding box."""
    xs, ys = edge((0.0, float(header.height), float(header.width), 0.0))
    points = [header.affine @ (x, y) for x, y in zip(xs, ys, strict=True)]
    x, y = to_crs(header.crs, grid.crs, [p for p, _ in points], [q for _, q in points])
    columns = [(value - grid.west) / grid.step_x for value in x]
    rows = [(grid.north - value) / grid.step_y for value in y]
    outer = min(columns), min(rows), max(columns), max(rows)
    middle = (outer[0] + outer[2]) / 2, (outer[1] + outer[3]) / 2
    quarter = len(columns) // 4
    sides = [(columns[i * quarter : (i + 1) * quarter], rows[i * quarter : (i + 1) * quarter]) for i in range(4)]
    inner = list(outer)
    for side_columns, side_rows in sides:
        wide = max(side_columns) - min(side_columns) > max(side_rows) - min(side_rows)
        if wide and sum(side_rows) / quarter < middle[1]:
            inner[1] = max(side_rows)
        elif wide:
            inner[3] = min(side_rows)
        elif sum(side_columns) / quarter < middle[0]:
            inner[0] = max(side_columns)
        else:
            inner[2] = min(side_columns)
    size = max(0.0, inner[2] - inner[0]) * max(0.0, inner[3] - inner[1])
    if size < SHEARED * (outer[2] - outer[0]) * (outer[3] - outer[1]):
        return outer
    return inner[0], inner[1], inner[2], inner[3]


def scene_ratio(measured: float, wanted: float | None) -> Fraction:
    """Return PAN pixels per LR pixel as a fraction, near a wanted value if one is given.

    Raises:
        UnusableError: ``wrong-ratio``.
    """
    if wanted is not None:
        found = nice_ratio(wanted)
        if found is None or abs(measured / wanted - 1) > 0.02:
            raise UnusableError(
                "wrong-ratio", f"its pixels have a ratio of {measured:.4g}, the dataset's is {wanted:.4g}"
            )
        return found
    found = nice_ratio(measured)
    if found is None or not 1 <= found <= 64:
        raise UnusableError(
            "wrong-ratio", f"a revisit's pixel is {measured:.4g} PAN pixels wide: give `ratio` in scenes.toml"
        )
    return found


def footprint(grid: Grid) -> Corners | None:
    """Return the corners of a grid, None if its coordinate system is unknown."""
    if grid.crs is None:
        return None
    west, south, east, north = grid.bounds
    xs, ys = to_crs(grid.crs, "EPSG:4326", (west, east, east, west), (north, north, south, south))
    return tuple(zip(xs, ys, strict=True))


def _check_placed(header: Header, grid: Grid, pan: Header) -> None:
    """Refuse an image that has no place beside the PAN."""
    if header.transform is None:
        across, down = grid.width / header.width, grid.height / header.height
        if abs(across / down - 1) > 1.5 / min(header.width, header.height):
            raise UnusableError(
                "no-georeference",
                f"{header.title} has no georeference, and its {header.width} x {header.height} px are not the shape of "
                f"{pan.title} with {grid.width} x {grid.height} px",
            )
        return
    if pan.transform is None and grid.crs is None:
        raise UnusableError("no-georeference", f"{pan.title} has no georeference, and {header.title} has one")
    if (header.crs is None) != (grid.crs is None):
        raise UnusableError(
            "no-georeference",
            f"{header.title if header.crs is None else pan.title} has coordinates and no coordinate system: set it, "
            "for example with `gdal_edit -a_srs`",
        )


def _check_meet(
    grid: Grid, headers: Mapping[str, Header], boxes: Mapping[str, tuple[float, float, float, float]]
) -> None:
    """Refuse an image that does not meet the PAN; name the distance."""
    for title, (left, top, right, bottom) in boxes.items():
        across = max(0.0, left - grid.width, -right)
        down = max(0.0, top - grid.height, -bottom)
        if min(right, grid.width) <= max(left, 0) or min(bottom, grid.height) <= max(top, 0):
            raise UnusableError(
                "no-overlap",
                f"{title} lies {_distance(grid, across, down, headers[title])} from the panchromatic image",
            )


def _distance(grid: Grid, across: float, down: float, header: Header) -> str:
    if grid.crs is None:
        return f"{math.hypot(across, down):.0f} PAN pixels"
    if not CRS.from_string(grid.crs).is_geographic:
        return f"{math.hypot(across * grid.step_x, down * grid.step_y) / 1000:.1f} km"
    latitude = math.radians(grid.north)
    return (
        f"{math.radians(math.hypot(across * grid.step_x * math.cos(latitude), down * grid.step_y)) * EARTH_KM:.1f} km"
    )


def _step_in(header: Header, crs: str | None) -> float:
    """Return the side of a raster's pixels in another coordinate system."""
    left, bottom, right, top = _bounds(header)
    result, *_ = calculate_default_transform(
        CRS.from_string(header.crs), CRS.from_string(crs), header.width, header.height, left, bottom, right, top
    )
    return float(result.a)


def _bounds(header: Header) -> Bounds:
    corners = [header.affine @ (x, y) for x in (0, header.width) for y in (0, header.height)]
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    return min(xs), min(ys), max(xs), max(ys)


def _ratio(header: Header, grid: Grid) -> float:
    a, b, _, d, e, _ = header.affine[:6]
    step = math.sqrt(abs(a * e - b * d))
    if header.crs != grid.crs:
        step = _step_in(header, grid.crs)
    elif not b and not d and abs(abs(a) / grid.step_x / (abs(e) / grid.step_y) - 1) > RATIO_TOLERANCE:
        raise UnusableError(
            "wrong-ratio",
            f"{header.title} has pixels of {abs(a) / grid.step_x:.4g} PAN pixels across and "
            f"{abs(e) / grid.step_y:.4g} down",
        )
    return step / math.sqrt(grid.step_x * grid.step_y)


def _anchor(header: Header, grid: Grid) -> tuple[float, float]:
    if header.crs != grid.crs or not header.is_north_up:
        return 0.0, 0.0
    _, _, west, _, _, north = header.affine[:6]
    return (west - grid.west) / grid.step_x, (grid.north - north) / grid.step_y
