"""Products of Sentinel-2 as they are delivered: folders named .SAFE, and zips of one, which are read in place.

Read are ``MTD_MSIL1C.xml`` or ``MTD_MSIL2A.xml``, the bands in ``IMG_DATA`` at their finest pixels, and as cloud mask
``SCL`` (L2A) or ``MSK_CLASSI_B00`` (L1C since processing baseline 04.00). Product specification: S2-PDGS-TAS-DI-PSD, 14
and 15.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element

from sharding.errors import UnusableError
from sharding.sources.scenes.header import CloudMask, Header, Piece, read_raster
from sharding.sources.scenes.layout import SAFE, File, as_date
from sharding.sources.scenes.products.metadata import as_number, number_of, read_xml, text_of

MOST_FILES = 20_000
"""Files of a product; a delivered one has about 200."""
OFFSETS_SINCE = 4.0
"""Processing baseline whose values have an offset, which the metadata then tell."""

_METADATA = re.compile(r"MTD_MSIL(1C|2A)\.xml")
_BAND = re.compile(r"GRANULE/([^/]+)/IMG_DATA/(?:R(?:10|20|60)m/)?[^/]+_(B(?:0[1-9]|1[0-2]|8A))(?:_(10|20|60)m)?")
_SCL = re.compile(r"GRANULE/[^/]+/IMG_DATA/(?:R(?:20|60)m/)?[^/]+_SCL_(20|60)m\.jp2")
_CLASSES = re.compile(r"GRANULE/[^/]+/QI_DATA/MSK_CLASSI_B00\.jp2")
_IDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
"""Band of each ``band_id``, also in L2A, which lacks B10."""

SCL_CLOUD, SCL_UNKNOWN = (3, 8, 9, 10), (0, 1)
"""Scene classes of shadow, cloud and cirrus; and those of no data and of saturated or defective pixels."""


def read_safe(file: File) -> Header:
    """Read the header of a product: its grid is that of its finest pixels.

    Raises:
        UnusableError: If it is no such product, or its parts do not fit together.
    """
    files = _listed(file)
    found = [name for name in files if _METADATA.fullmatch(name)]
    if len(found) != 1:
        raise UnusableError(
            "missing-file",
            f"{file.name} holds no MTD_MSIL1C.xml or MTD_MSIL2A.xml: a product of Sentinel-2 as delivered since "
            "December 2016 is needed",
        )
    metadata = files[found[0]]
    root = read_xml(metadata)
    bands = _bands(file, root, files)
    rasters = {band: read_raster(image) for band, image in sorted(bands.items(), key=lambda item: _IDS.index(item[0]))}
    finest = min(rasters.values(), key=lambda raster: _step(raster))
    pieces = tuple(
        replace(_piece(finest, raster), bands=(number,)) for number, raster in enumerate(rasters.values(), start=1)
    )
    quantification, offsets = _radiometry(metadata, root)
    baseline = text_of(root, "PROCESSING_BASELINE")
    flaw = None
    if not offsets and baseline and as_number(metadata, "PROCESSING_BASELINE", baseline) >= OFFSETS_SINCE:
        flaw = f"has processing baseline {baseline}, whose offset its metadata do not tell"
    values = {
        (text_of(item, "SPECIAL_VALUE_TEXT") or "").upper(): number_of(metadata, item, "SPECIAL_VALUE_INDEX")
        for item in root.iter("Special_Values")
    }
    return replace(
        finest,
        file=file,
        names=tuple(rasters),
        nodata=(values.get("NODATA", 0.0),) * len(rasters),
        scales=(1 / quantification,) * len(rasters),
        offsets=tuple(offsets.get(band, 0.0) / quantification for band in rasters),
        date=as_date(text_of(root, "DATATAKE_SENSING_START") or text_of(root, "PRODUCT_START_TIME")),
        pieces=pieces,
        metadata=(metadata,),
        saturated=values.get("SATURATED"),
        mask=_mask(files),
        flaw=flaw,
        processing=f"processing baseline {baseline}" if baseline else None,
    )


def _listed(file: File) -> Mapping[str, File]:
    """Return the files of a product by their names in it."""
    if file.path.is_dir():
        found = {}
        for folder, _, names in os.walk(file.path):
            for name in names:
                path = Path(folder, name)
                inner = path.relative_to(file.path).as_posix()
                if path.is_file():
                    found[inner] = File(path, f"{file.name}/{inner}", path.stat().st_size)
            if len(found) > MOST_FILES:
                raise UnusableError("absurd-size", f"{file.name} holds more than {MOST_FILES} files")
        return found
    try:
        with zipfile.ZipFile(file.path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise UnusableError("unreadable", f"{file.name} is no whole zip ({error})") from error
    tops = {info.filename.partition("/")[0] for info in infos}
    products = [top for top in tops if top.lower().endswith(SAFE)]
    if len(products) != 1 or len(infos) > MOST_FILES:
        raise UnusableError("missing-file", f"{file.name} is no zip of one product of Sentinel-2, a folder named .SAFE")
    top = f"{products[0]}/"
    return {
        info.filename.removeprefix(top): File(file.path, f"{file.name}/{info.filename}", info.file_size, info.filename)
        for info in infos
        if info.filename.startswith(top)
    }


def _bands(file: File, root: Element, files: Mapping[str, File]) -> dict[str, File]:
    """Return the finest raster of each band, of those that the metadata list and the product holds."""
    found: dict[str, tuple[int, File]] = {}
    granules = set()
    listed = [element.text or "" for tag in ("IMAGE_FILE", "IMAGE_FILE_2A") for element in root.iter(tag)]
    for name in listed:
        match = _BAND.fullmatch(name.strip())
        raster = files.get(f"{name.strip()}.jp2")
        if match is None or raster is None:
            continue
        granules.add(match[1])
        size = int(match[3] or 0)
        if match[2] not in found or size < found[match[2]][0]:
            found[match[2]] = size, raster
    if len(granules) > 1:
        raise UnusableError("unreadable", f"{file.name} has {len(granules)} granules: one is needed")
    if not found:
        raise UnusableError(
            "missing-file", f"{file.name} holds none of the {len(listed)} images that its metadata list"
        )
    return {band: raster for band, (_, raster) in found.items()}


def _step(raster: Header) -> float:
    if raster.transform is None or raster.crs is None or len(raster.names) != 1:
        raise UnusableError("no-georeference", f"{raster.title} is not one band with a georeference")
    return raster.transform[0]


def _piece(finest: Header, raster: Header) -> Piece:
    """Return a band's raster as a piece of the image with the finest pixels."""
    zoom = round(_step(raster) / _step(finest))
    same = zoom >= 1 and raster.crs == finest.crs
    scaled = finest.at(max(1, zoom))
    if (
        not same
        or raster.transform != scaled.transform
        or (raster.width, raster.height)
        != (
            scaled.width,
            scaled.height,
        )
    ):
        raise UnusableError("size-mismatch", f"{raster.title} does not cover the land of {finest.title}")
    return replace(raster.pieces[0], zoom=zoom)


def _radiometry(metadata: File, root: Element) -> tuple[float, dict[str, float]]:
    """Return the quantification value, and the offset of each band, none before processing baseline 04.00."""
    names = ("BOA_QUANTIFICATION_VALUE", "L2A_BOA_QUANTIFICATION_VALUE", "QUANTIFICATION_VALUE")
    told = [number_of(metadata, root, name) for name in names]
    values = [value for value in told if value is not None and value > 0]
    if not values:
        raise UnusableError("unreadable", f"{metadata.name} tells no {names[0]} above 0")
    offsets = {}
    for element in (*root.iter("BOA_ADD_OFFSET"), *root.iter("RADIO_ADD_OFFSET")):
        number = element.get("band_id", "")
        if not number.isdecimal() or int(number) >= len(_IDS):
            raise UnusableError("unreadable", f"{metadata.name}: {element.tag} has the band_id {number!r}, not 0 to 12")
        offsets[_IDS[int(number)]] = as_number(metadata, element.tag, element.text)
    return values[0], offsets


def _mask(files: Mapping[str, File]) -> CloudMask | None:
    """Return the cloud mask of a product, None without one."""
    classes = sorted(name for name in files if _SCL.fullmatch(name))  # 20 m before 60 m
    if classes:
        return CloudMask(read_raster(files[classes[0]]), SCL_CLOUD, SCL_UNKNOWN)
    found = [name for name in files if _CLASSES.fullmatch(name)]
    if found:
        header = read_raster(files[found[0]])
        if len(header.names) >= 2:
            return CloudMask(header, (1,), (), bands=(1, 2))  # opaque clouds, cirrus
    return None
