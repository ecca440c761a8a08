"""Products in DIMAP version 2, of Pleiades, Pleiades Neo and SPOT 6 and 7: a ``DIM_*.XML`` and its tiles.

Read are the size, the tiles, the bands by ``Raster_Index_List``, special values, day, and the conversion to
reflectance: of REFLECTANCE products by ``Band_Reflectance``, of BASIC ones by the gains of ``Band_Radiance``, the solar
irradiance and the sun's elevation. The place is the tiles' own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import PurePosixPath
from xml.etree.ElementTree import Element

from sharding.errors import UnusableError
from sharding.sources.bands import canonical
from sharding.sources.scenes.grid import Affine6
from sharding.sources.scenes.header import Header, Piece, read_raster
from sharding.sources.scenes.layout import File, as_date
from sharding.sources.scenes.products.metadata import as_number, number_of, read_xml, text_of

MOST_TILES = 10_000
"""Tiles of a product; the largest have some hundred."""
BANDS: Mapping[str, str] = {
    **{"P": "pan", "PAN": "pan", "B0": "blue", "B1": "green", "B2": "red", "B3": "nir"},
    **{"B": "blue", "G": "green", "R": "red", "NIR": "nir", "RE": "rededge", "DB": "coastal"},
}
"""Common name of each BAND_ID."""
REFLECTANCE_GAIN = 10_000.0
"""Values of a reflectance of 1 in REFLECTANCE products, whose metadata may leave it out."""
OFF_PX = 0.5
"""Distance between the place of a tile by its georeference and by its number above which the product is refused."""


@dataclass(frozen=True)
class _Tile:
    """A tile of a product."""

    header: Header
    """Header of its file."""
    bands: tuple[int, ...]
    """Bands of the product that it holds."""
    row: int
    """Row of the tile, from 1."""
    column: int
    """Column of the tile, from 1."""


def read_dimap(file: File) -> Header:
    """Read the header of a product.

    Raises:
        UnusableError: If it is no such product, is not orthorectified, or its parts do not fit together.
    """
    root = read_xml(file)
    if root.tag != "Dimap_Document" or root.find("Raster_Data") is None:
        raise UnusableError("unreadable", f"{file.name} describes no image in DIMAP version 2: give a DIM_*.XML")
    tiles, ids = _tiles(file, root)
    first = next((tile for tile in tiles if (tile.row, tile.column) == (1, 1)), tiles[0])
    if any(tile.header.transform is None for tile in tiles):
        raise UnusableError(
            "no-georeference",
            f"{file.name} is a product of level {text_of(root, 'PROCESSING_LEVEL') or 'unknown'} whose tiles have no "
            "georeference: order it as ORTHO, or orthorectify it",
        )
    width, height = (_count(file, root, f"Raster_Dimensions/{name}") for name in ("NCOLS", "NROWS"))
    pieces = tuple(_piece(file, root, tile, first, (width, height)) for tile in tiles)
    _check_whole(file, pieces, (width, height), len(ids))
    special = {
        (text_of(item, "SPECIAL_VALUE_TEXT") or "").upper(): number_of(file, item, "SPECIAL_VALUE_COUNT")
        for item in root.iter("Special_Value")
    }
    calibration, flaw = _calibration(file, root)
    count = len(ids)
    return replace(
        first.header,
        file=file,
        width=width,
        height=height,
        names=tuple(BANDS.get(name or "", name and canonical(name)) for name in ids),
        nodata=(special.get("NODATA"),) * count,
        scales=(1.0,) * count,
        offsets=(0.0,) * count,
        date=as_date(text_of(root, "IMAGING_DATE")),
        pieces=pieces,
        metadata=(file,),
        saturated=special.get("SATURATED"),
        calibration=calibration,
        flaw=flaw,
    )


def _tiles(file: File, root: Element) -> tuple[list[_Tile], list[str | None]]:
    """Return the tiles, and the BAND_ID of each band, None where the product does not tell it."""
    found: list[_Tile] = []
    ids: list[str | None] = []
    shared = root.find("Raster_Data/Raster_Display")
    groups = list(root.iterfind("Raster_Data/Data_Access/Data_Files"))
    for group in groups:
        headers = [(item, read_raster(_beside(file, item))) for item in group.iterfind("Data_File")]
        if not headers or len(found) + len(headers) > MOST_TILES:
            raise UnusableError("unreadable", f"{file.name} lists {len(found) + len(headers)} tiles")
        size = len(headers[0][1].names)
        own = group.find("Raster_Display")
        names = _ids(file, own if own is not None else shared, size)
        bands = tuple(range(len(ids) + 1, len(ids) + size + 1))
        ids += names
        for item, header in headers:
            if len(header.names) != size:
                raise UnusableError("wrong-bands", f"{header.title} has {len(header.names)} bands, others have {size}")
            row, column = (int(as_number(file, key, item.get(key, "1"))) for key in ("tile_R", "tile_C"))
            found.append(_Tile(header, bands, row, column))
    if not found:
        raise UnusableError("missing-file", f"{file.name} lists no tiles")
    told = _count(file, root, "Raster_Dimensions/NBANDS")
    if told != len(ids):
        raise UnusableError("wrong-bands", f"{file.name} tells {told} bands, and its tiles hold {len(ids)}")
    return found, ids if told > 1 or ids != [None] else _single(root)


def _single(root: Element) -> list[str | None]:
    """Return the BAND_ID of a product of one band: the only one of its metadata."""
    told = {(element.text or "").strip() for element in root.iter("BAND_ID")}
    return [told.pop() if len(told) == 1 else None]


def _ids(file: File, display: Element | None, size: int) -> list[str | None]:
    """Return the BAND_ID of each band of a group's files."""
    ids: list[str | None] = [None] * size
    for item in display.iterfind("Raster_Index_List/Raster_Index") if display is not None else ():
        number = int(number_of(file, item, "BAND_INDEX") or 0)
        if not 1 <= number <= size:
            raise UnusableError("wrong-bands", f"{file.name} has the BAND_INDEX {number}, and files of {size} bands")
        ids[number - 1] = text_of(item, "BAND_ID")
    return ids


def _beside(file: File, item: Element) -> File:
    """Return the file of a tile, which lies in the folder of the metadata or below it."""
    found = item.find("DATA_FILE_PATH")
    name = found.get("href", "") if found is not None else ""
    if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in PurePosixPath(name).parts:
        raise UnusableError("unsafe-path", f"{file.name} names the tile {name!r}, which is no file beside it")
    path = file.path.parent / name
    inner = (PurePosixPath(file.name).parent / name).as_posix()
    if not path.is_file():
        raise UnusableError("missing-file", f"{inner} is missing, which {file.name} names")
    return File(path, inner, path.stat().st_size)


def _piece(file: File, root: Element, tile: _Tile, first: _Tile, size: tuple[int, int]) -> Piece:
    """Return a tile as a piece of the product."""
    header = tile.header
    assert header.transform is not None
    assert first.header.transform is not None
    *linear, x, y = _split(header.transform)
    *wanted, _, _ = _split(first.header.transform)
    if linear != wanted or header.crs != first.header.crs or header.dtype != first.header.dtype:
        raise UnusableError("size-mismatch", f"{header.title} has other pixels than {first.header.title}")
    column, row = ~first.header.affine * (x, y)
    sides = root.find("Raster_Data/Raster_Dimensions/Tile_Set/Regular_Tiling")
    places = [round(column), round(row)]
    if sides is None or (first.row, first.column) != (1, 1):
        expected = [column, row]
    else:
        across, down = (_attribute(file, sides, "NTILES_SIZE", name) for name in ("ncols", "nrows"))
        shared = [_attribute(file, sides, "NTILES_OVERLAP", name, 0) for name in ("ncols", "nrows")]
        expected = [(tile.column - 1) * (across - shared[0]), (tile.row - 1) * (down - shared[1])]
    if any(abs(a - b) > OFF_PX for a, b in zip((column, row), expected, strict=True)):
        raise UnusableError("size-mismatch", f"{header.title} does not lie where {file.name} has its tile")
    inside = all(
        place >= 0 and place + own <= whole
        for place, own, whole in zip(places, (header.width, header.height), size, strict=True)
    )
    if not inside:
        raise UnusableError("size-mismatch", f"{header.title} leaves the {size[0]} x {size[1]} px of its product")
    return Piece(header.file, tile.bands, header.width, header.height, places[0], places[1])


def _check_whole(file: File, pieces: Sequence[Piece], size: tuple[int, int], bands: int) -> None:
    """Refuse a product whose tiles do not reach its edges; a tile that is missing between them has no data."""
    right, bottom = max(p.column + p.width for p in pieces), max(p.row + p.height for p in pieces)
    if (right, bottom) != size:
        raise UnusableError(
            "size-mismatch", f"{file.name} tells {size[0]} x {size[1]} px, and its tiles have {right} x {bottom}"
        )
    assert {band for piece in pieces for band in piece.bands} == set(range(1, bands + 1))


def _split(transform: Affine6) -> tuple[float, ...]:
    """Return the linear part of a transform, then its corner."""
    a, b, c, d, e, f = transform
    return a, b, d, e, c, f


def _calibration(file: File, root: Element) -> tuple[dict[str, tuple[float, float]], str | None]:
    """Return scale and offset by the common name of a band; or the reason why the metadata tell none."""
    kind = (text_of(root, "RADIOMETRIC_PROCESSING") or "").upper()
    if kind == "REFLECTANCE":
        found = {name: (1 / gain, bias) for name, gain, bias in _measures(file, root, "Band_Reflectance")}
        names = {BANDS.get(element.text or "", "") for element in root.iter("BAND_ID")} or {""}
        return found or dict.fromkeys(names, (1 / REFLECTANCE_GAIN, 0.0)), None
    if kind != "BASIC":
        return {}, f"has the radiometric processing {kind or 'unknown'}, which is no measure of reflectance"
    radiances = list(_measures(file, root, "Band_Radiance"))
    suns = {
        BANDS.get(text_of(item, "BAND_ID") or "", ""): number_of(file, item, "VALUE")
        for item in root.iter("Band_Solar_Irradiance")
    }
    elevation = _elevation(file, root)
    day = as_date(text_of(root, "IMAGING_DATE"))
    if not radiances or elevation is None or day is None or not all(suns.get(name) for name, _, _ in radiances):
        return {}, "lacks gains, solar irradiance, sun elevation or day, which reflectance needs"
    light = math.sin(math.radians(elevation)) / (math.pi * sun_distance(day) ** 2)
    found = {}
    for name, gain, bias in radiances:
        sun = suns[name] or math.nan
        found[name] = 1 / (gain * sun * light), bias / (sun * light)
    return found, None


def sun_distance(day: str) -> float:
    """Return the distance of the sun on a day ``YYYY-MM-DD``, astronomical units, to 0.0002.

    It is a Kepler orbit of eccentricity 0.0167 with its perihelion on January 4.
    """
    number = date.fromisoformat(day).timetuple().tm_yday
    anomaly = 2 * math.pi * (number - 4) / 365.256
    return 1 - 0.01671 * math.cos(anomaly) + 0.00014 * (1 - math.cos(2 * anomaly))


def _measures(file: File, root: Element, tag: str) -> Iterator[tuple[str, float, float]]:
    """Yield common name, gain and bias of each band: the measure is value / gain + bias."""
    for item in root.iter(tag):
        gain, bias = number_of(file, item, "GAIN"), number_of(file, item, "BIAS")
        if not gain or gain < 0:
            raise UnusableError("unreadable", f"{file.name}: a {tag} has the GAIN {gain}, which must be above 0")
        yield BANDS.get(text_of(item, "BAND_ID") or "", ""), gain, bias or 0.0


def _elevation(file: File, root: Element) -> float | None:
    """Return the sun's elevation in the middle of the image, degrees; None if unknown or below the horizon."""
    found = list(root.iter("Located_Geometric_Values"))
    middle = [item for item in found if (text_of(item, "LOCATION_TYPE") or "").upper() == "CENTER"] or found
    elevation = number_of(file, middle[0], "SUN_ELEVATION") if middle else None
    return elevation if elevation is not None and 0 < elevation <= 90 else None


def _count(file: File, root: Element, path: str) -> int:
    number = number_of(file, root, path)
    if number is None or not 1 <= number <= 2**31 or not number.is_integer():
        raise UnusableError("unreadable", f"{file.name}: {path} is {number}, not a number of pixels")
    return int(number)


def _attribute(file: File, root: Element, tag: str, name: str, usual: int | None = None) -> float:
    found = root.find(tag)
    text = found.get(name) if found is not None else None
    return float(usual) if text is None and usual is not None else as_number(file, f"{tag} {name}", text)
