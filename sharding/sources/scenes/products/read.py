"""Images by the kind of file: a raster, a product of Sentinel-2, or a product in DIMAP."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sharding.sources.scenes.header import Header, read_raster
from sharding.sources.scenes.layout import SAFE, File
from sharding.sources.scenes.products.dimap import read_dimap
from sharding.sources.scenes.products.sentinel2 import read_safe

PRODUCTS: Mapping[str, Callable[[File], Header]] = {SAFE: read_safe, ".zip": read_safe, ".xml": read_dimap}
"""Reader of each kind of product, by the end of its name."""


def read_header(file: File) -> Header:
    """Read the header of an image.

    Raises:
        UnusableError: If it is damaged, of an unknown format, or has no place.
    """
    return PRODUCTS.get(file.path.suffix.lower(), read_raster)(file)
