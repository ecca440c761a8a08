"""Draft of a ``scenes.toml``: what a folder's rasters are, as far as they tell it; open questions are comments."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rasterio.crs import CRS
from rasterio.windows import Window

from sharding.errors import UnusableError, UserError
from sharding.prepare.checks import BRIGHTEST, fitting_scale
from sharding.sources.bands import SYNONYMS, canonical
from sharding.sources.scenes.header import Header, opened
from sharding.sources.scenes.layout import DATE, File, walk
from sharding.sources.scenes.products.read import PRODUCTS, read_header

MOST_FILES = 2000
"""Files whose headers are read; a folder with more is described by the first ones."""
SAME = 1.2
"""Ratio of pixel sizes up to which two rasters are of one kind."""
SAMPLE_PX = 256
"""Side of the part of a raster whose values are looked at."""
_KNOWN = re.compile(r".+\.(tiff?|jp2|zip|safe)|(.+/)?DIM_[^/]+\.xml", re.IGNORECASE)
_METRES_PER_DEGREE = 111_320.0


@dataclass(frozen=True)
class _Kind:
    """Rasters that seem to be of one kind."""

    headers: tuple[Header, ...]
    pixel: float

    @property
    def first(self) -> Header:
        return self.headers[0]


def describe_folder(folder: Path) -> str:
    """Return a draft of ``scenes.toml`` for a folder of GeoTIFFs, products of Sentinel-2 and products in DIMAP.

    PAN is taken to be the finest single band, the target the finest raster of several bands, the revisits the coarsest.

    Raises:
        UserError: If the folder holds no rasters, or no such three kinds.
    """
    headers, unread = _headers(folder)
    kinds = _kinds(headers)
    colour = [kind for kind in kinds if len(kind.first.names) > 1]
    single = [kind for kind in kinds if len(kind.first.names) == 1]
    pans = [kind for kind in single if not _is_mask(kind.first)]
    if not pans or len(colour) < 2:
        found = "; ".join(f"{len(kind.headers)} of {_words(kind)}, such as {kind.first.title}" for kind in kinds)
        raise UserError(
            f"{folder} needs rasters of three kinds: one fine band (PAN), several fine bands (target), and several "
            f"coarse bands (revisits); it holds {found or 'none'}"
        )
    pan, target, revisits = pans[0], colour[0], colour[-1]
    masks = [kind for kind in single if _is_mask(kind.first) and kind.pixel / revisits.pixel < SAME]
    scenes = _scene_names(pan, target)
    lines = ["# Written by `satfusion describe`: check it, above all the lines with a question mark, then run", "#"]
    lines += [f"#   satfusion shard --source scenes --input {folder} --revisits R --output URI", "#"]
    lines += [f"# ? {title} was not read: {why}" for title, why in unread[:20]]
    used = (pan, target, revisits, *masks[:1])
    lines += [f"# ? not used: {len(kind.headers)} of {_words(kind)}" for kind in kinds if kind not in used]
    lines += _section("revisits", revisits, scenes)
    lines += _section("pan", pan, scenes)
    lines += _section("target", target, scenes)
    if masks:
        lines += ["", "[masks]", f"files = {_text(_pattern(masks[0], scenes, 'revisit'))}"]
        lines += ["cloud = [1]  # ? the values that mean cloud or shadow; of Sentinel-2's SCL: [3, 8, 9, 10]"]
    return "\n".join(lines) + "\n"


def _headers(folder: Path) -> tuple[list[Header], list[tuple[str, str]]]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder of your GeoTIFFs")
    headers: list[Header] = []
    unread: list[tuple[str, str]] = []
    files = [file for file in walk(folder) if _KNOWN.fullmatch(file.name)]
    for file in sorted(files, key=lambda file: not _is_product(file))[:MOST_FILES]:
        if any(file in header.files(range(1, len(header.names) + 1)) for header in headers if header.metadata):
            continue  # a tile of a product
        try:
            headers.append(read_header(file))
        except UnusableError as error:
            unread.append((file.name, error.detail))
    return headers, unread


def _is_product(file: File) -> bool:
    return file.path.suffix.lower() in PRODUCTS


def _kinds(headers: Sequence[Header]) -> list[_Kind]:
    """Group rasters by number of bands, type of mask and size of pixels; the finest first."""
    found: list[list[Header]] = []
    for header in sorted(headers, key=lambda header: (_pixel(header), header.title)):
        for group in found:
            same = len(group[0].names) == len(header.names) and _is_mask(group[0]) == _is_mask(header)
            if same and _pixel(header) / _pixel(group[0]) < SAME:
                group.append(header)
                break
        else:
            found.append([header])
    return [_Kind(tuple(group), _pixel(group[0])) for group in found]


def _pixel(header: Header) -> float:
    """Return the side of a pixel, m; without a georeference as if all rasters had the same width."""
    if header.transform is None:
        return 1e6 / header.width
    a, b, _, d, e, _ = header.transform
    degrees = header.crs is not None and CRS.from_string(header.crs).is_geographic
    return math.sqrt(abs(a * e - b * d)) * (_METRES_PER_DEGREE if degrees else 1.0)


def _is_mask(header: Header) -> bool:
    return len(header.names) == 1 and header.dtype == "uint8" and "pan" not in Path(header.title).stem.lower()


def _words(kind: _Kind) -> str:
    return f"{len(kind.first.names)} bands with pixels of {kind.pixel:.3g} m"


def _scene_names(*kinds: _Kind) -> list[str]:
    """Return the names of the scenes: the folders, or the parts in which the file names of PAN differ."""
    for kind in kinds:
        folders = {os.path.dirname(header.title) for header in kind.headers}
        if len(folders) == len(kind.headers) > 1:
            head, tail = _ends(sorted(folders))
            head = head[: head.rfind("/") + 1]
            tail = tail[tail.find("/") :] if "/" in tail else ""
            return sorted(folder[len(head) : len(folder) - len(tail)] for folder in folders)
        if len(kind.headers) > 1:
            names = sorted(Path(header.title).stem for header in kind.headers)
            head, tail = _ends(names)
            head = re.sub(r"[^_.-]*$", "", head)  # names end at a separator
            tail = re.sub(r"^[^_.-]*", "", tail)
            return [name[len(head) : len(name) - len(tail)] for name in names]
    return []


def _pattern(kind: _Kind, scenes: Sequence[str], rest: str) -> str:
    """Return a pattern that the kind's files match."""
    names = []
    for header in kind.headers:
        name = header.title
        for scene in sorted(scenes, key=len, reverse=True):
            if scene and re.search(rf"(^|[/_-]){re.escape(scene)}([/_.-]|$)", name):
                name = re.sub(rf"(^|(?<=[/_-])){re.escape(scene)}(?=[/_.-]|$)", "{scene}", name)
                break
        names.append(re.sub(DATE, "{date}", name, count=1))
    names = sorted(set(names))
    if len(names) == 1:
        return names[0]
    head, tail = _ends(names)
    head = head[: head.rfind("{")] if head.count("{") > head.count("}") else head
    tail = tail[tail.find("}") + 1 :] if tail.count("}") > tail.count("{") else tail
    return f"{head}{{{rest}}}{tail}"


def _ends(names: Sequence[str]) -> tuple[str, str]:
    """Return the longest common beginning and end of several names."""
    head = _common(names)
    return head, _common([name[len(head) :][::-1] for name in names])[::-1]


def _common(names: Sequence[str]) -> str:
    first, last = min(names), max(names)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(letter for letter, _ in same)


def _section(title: str, kind: _Kind, scenes: Sequence[str]) -> list[str]:
    header = kind.first
    lines = ["", f"[{title}]", f"# {len(kind.headers)} of {_words(kind)}, {header.dtype}, such as {header.title}"]
    lines.append(f"files = {_text(_pattern(kind, scenes, 'revisit' if title == 'revisits' else 'scene'))}")
    names = [canonical(name) if name else None for name in header.names]
    if title != "pan":
        if all(name in SYNONYMS for name in names):
            lines.append(f"# bands by the files: {', '.join(str(name) for name in names)}")
        else:
            lines.append(f'# ? the files do not name their {len(names)} bands: order = ["blue", "green", "red", "nir"]')
    lines += _values(kind)
    if header.transform is None:
        lines.append("# ? no georeference: the files must cover the same land as the others")
    elif header.crs is None:
        lines.append("# ? no coordinate system: set it, for example with `gdal_edit -a_srs`")
    if all(value is None for value in header.nodata):
        lines.append("# ? no value without data is tagged: nodata = 0")
    if header.mask is not None:
        lines.append("# clouds by the mask of each product; [masks] would replace it")
    if header.date is None and not any("{date}" in line for line in lines) and title != "target":
        lines.append('# ? no date: put {date} into the pattern, or date = "2020-05-01"')
    return lines


def _values(kind: _Kind) -> list[str]:
    """Return the line of the scale: the files' own, or one that would fit their values."""
    header = kind.first
    if header.flaw:
        return [f"# ? {header.title} {header.flaw}: give scale and offset"]
    if header.metadata:
        versions = sorted({header.processing for header in kind.headers if header.processing})
        return [
            f"# scale, offset and nodata by the metadata of each product{', ' * bool(versions)}{', '.join(versions)}"
        ]
    if any((scale, offset) != (1.0, 0.0) for scale, offset in zip(header.scales, header.offsets, strict=True)):
        return [f"# scale {header.scales[0]:g} and offset {header.offsets[0]:g} are tagged in the files"]
    with opened(header.file) as raster:
        x, y = (max(0, (side - SAMPLE_PX) // 2) for side in (header.width, header.height))
        window = Window(x, y, min(SAMPLE_PX, header.width), min(SAMPLE_PX, header.height))
        values = raster.read(1, window=window).astype(np.float64)
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size or float(np.median(values)) <= BRIGHTEST:
        return []
    middle = float(np.median(values))
    scale = fitting_scale(float(values.max()), middle)
    return [f"scale = {scale:.6g}  # ? half of the values are above {middle:g}: reflectance {middle * scale:.3f}"]


def _text(pattern: str) -> str:
    return json.dumps(pattern, ensure_ascii=False)
