"""Page of a whole dataset: one HTML file without scripts or links, for any browser.

Memory holds one sample at a time, and the page at most `MOST_AOIS` AOIs, those whose revisits and target agree least
first. What comes from the dataset is escaped and cut.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sharding.format.entries import SampleEntry, ShardEntry
from sharding.format.index import SPLITS, Index
from sharding.format.sample import Sample, fetch_sample
from sharding.inspection.describe import describe
from sharding.picture import robust_high, to_rgb8
from sharding.progress import progress
from sharding.run.named_file import PAGE_START, write_page
from sharding.scratch import scratch_folder
from sharding.storage import CorruptedError, Storage

MOST_AOIS = 1000
"""AOIs of a page."""
MOST_BANDS = 16
"""Bands of an AOI that are drawn."""
MOST_LAND = 10_000
"""Footprints on the map."""
LONGEST = 300
"""Characters of a text of the dataset."""
BINS = 48
THUMBNAIL_PX = 160
COLOURS = {"train": "#4477aa", "val": "#ccbb44", "test": "#ee6677"}

_HEAD = """<meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222 }}
pre {{ background: #f4f4f4; padding: 1em; overflow-x: auto; max-height: 24em }}
article {{ border-top: 1px solid #ccc; padding: 1em 0; display: flex; gap: 1.2em }}
article > div:first-child {{ flex: 0 0 24em }}
.seen {{ display: flex; flex-wrap: wrap; gap: 1.2em; align-content: flex-start }}
h2 {{ margin-top: 1.5em }} h3 {{ margin: 0 0 .4em; overflow-wrap: anywhere }}
figure {{ margin: 0 }} figcaption {{ font-size: 12px; color: #555 }}
table {{ border-collapse: collapse; font-size: 12px }} td, th {{ padding: 0 .8em 0 0; text-align: left }}
svg {{ background: #fafafa; border: 1px solid #ddd }} .bad {{ color: #b00 }}
</style>
</head>
<body>
"""


@dataclass(frozen=True)
class _Place:
    """Place of a sample in a dataset."""

    split: str
    shard: ShardEntry
    entry: SampleEntry

    @property
    def agreement(self) -> float | None:
        return self.entry.content.correlation if self.entry.content else None


def write_html(index: Index, storage: Storage, path: Path) -> int:
    """Write the page of a dataset; return the number of AOIs that it leaves out.

    Raises:
        UserError: If the store does not answer, or the file cannot be written.
    """
    places = [_Place(split, *pair) for split in SPLITS for pair in index.samples(split)]
    shown = sorted(places, key=lambda place: 2.0 if place.agreement is None else place.agreement)[:MOST_AOIS]
    with scratch_folder("page") as folder:
        draft = Path(folder, "page.html")
        with draft.open("w", encoding="utf-8") as file:
            file.write(PAGE_START + _HEAD.format(title=_text(f"Dataset {storage.uri}")))
            file.write(f"<h1>Dataset {_text(storage.uri)}</h1>\n")
            file.writelines(_overview(index, storage, places))
            file.write(f"<h2>AOIs, least agreement first ({len(shown)} of {len(places)})</h2>\n")
            with progress(len(shown), "drawing", "AOI") as bar:
                for place in shown:
                    file.write(_article(index, storage, place))
                    bar.update()
            file.write("</body>\n</html>\n")
        write_page(path, draft)
    return len(places) - len(shown)


def _overview(index: Index, storage: Storage, places: Sequence[_Place]) -> Iterator[str]:
    yield "<pre>"
    for number, line in enumerate(describe(index, storage)):
        if number == MOST_AOIS:
            yield "...\n"
            break
        yield _text(line) + "\n"
    yield "</pre>\n"
    yield _map(places)


def _map(places: Sequence[_Place]) -> str:
    """Draw the footprints by split, in degrees; longitude is not scaled by latitude."""
    lands = [(place, place.entry.content.land) for place in places if place.entry.content and place.entry.content.land]
    if not lands:
        return "<p>No place on land is known.</p>\n"
    west, south = (min(land[side] for _, land in lands) for side in (0, 1))
    east, north = (max(land[side] for _, land in lands) for side in (2, 3))
    scale = 900 / max(east - west, north - south, 1e-6)
    width, height = (max(60, round(extent * scale) + 20) for extent in (east - west, north - south))
    parts = []
    for place, (left, bottom, right, top) in lands[:MOST_LAND]:
        x, y = 10 + (left - west) * scale, 10 + (north - top) * scale
        wide, high = (max(3.0, side * scale) for side in (right - left, top - bottom))
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" fill="{COLOURS[place.split]}"'
            f' fill-opacity=".6"><title>{_text(place.entry.aoi)}</title></rect>'
        )
    legend = ", ".join(f'<span style="color:{colour}">{split}</span>' for split, colour in COLOURS.items())
    return (
        f"<h2>Footprints</h2><p>{legend}; longitude {west:.4f} to {east:.4f}, latitude {south:.4f} to {north:.4f}</p>\n"
        f'<svg width="{width}" height="{height}">{"".join(parts)}</svg>\n'
    )


def _article(index: Index, storage: Storage, place: _Place) -> str:
    agreement = "unknown" if place.agreement is None else f"{place.agreement:.3f}"
    title = f"<h3>{_text(place.entry.aoi)}</h3>{place.split}, agreement {agreement}"
    try:
        sample = fetch_sample(storage, place.shard, place.entry)
    except CorruptedError as error:
        return f'<article><div>{title}<p class="bad">{_text(error)}</p></div></article>\n'
    content = f"{title}{_facts(index, sample)}{_revisits(sample.meta, place.entry)}"
    seen = _pictures(index, sample) + _histograms(index, sample)
    return f'<article><div>{content}</div><div class="seen">{seen}</div></article>\n'


def _facts(index: Index, sample: Sample) -> str:
    (*_, low_rows, low_columns), (*_, rows, columns) = sample.lr.shape, sample.hr.shape
    chips = index.facts.chips
    lines = {
        "grid": f"{low_columns} x {low_rows} LR px, {columns} x {rows} PAN px, ratio {columns / low_columns:.4g}",
        "chips": f"{chips.columns} x {chips.rows} of {chips.size} LR px",
        "bands": f"{', '.join(index.facts.bands.lr)}; of the target {', '.join(index.facts.bands.hr)}",
        **{name: sample.meta.get(name) for name in ("crs", "bounds", "hr_date", "nodata_fraction", "saturated")},
    }
    rows_of = (
        f"<tr><th>{name}</th><td>{_text(value if isinstance(value, str) else json.dumps(value))}</td></tr>"
        for name, value in lines.items()
    )
    return f"<table>{''.join(rows_of)}</table>"


def _revisits(meta: Mapping[str, Any], entry: SampleEntry) -> str:
    known = meta.get("revisits")
    found = [item for item in known if isinstance(item, dict)] if isinstance(known, list) else []
    agreements = entry.content.revisits if entry.content else ()
    lines = []
    for number, item in enumerate(found[:50]):
        value = agreements[number] if number < len(agreements) else None
        cells = (
            f"{number}{' (clearest)' if number == meta.get('clearest') else ''}",
            item.get("date"),
            item.get("cloud_percent"),
            "" if value is None else f"{value:.3f}",
        )
        lines.append(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
    head = "<tr><th>revisit</th><th>date</th><th>cloud %</th><th>agreement</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"


def _pictures(index: Index, sample: Sample) -> str:
    """Draw the clearest revisit with the grid of chips, and the target, by one stretch."""
    step, bands = index.preparation.step, index.facts.bands
    target = sample.hr[list(bands.hr_rgb)] * step
    white = robust_high(target)
    clearest = sample.meta["clearest"]
    revisit = sample.lr[clearest if isinstance(clearest, int) else 0][list(bands.lr_rgb)] * step
    rows, columns = revisit.shape[-2:]
    chips = index.facts.chips
    squares = "".join(
        f'<rect x="{column * chips.stride}" y="{row * chips.stride}" width="{chips.size}" height="{chips.size}"/>'
        for column in range(min(chips.columns, 50))
        for row in range(min(chips.rows, 50))
    )
    high = max(1, min(round(THUMBNAIL_PX * rows / columns), 4 * THUMBNAIL_PX))
    grid = (
        f'<svg width="{THUMBNAIL_PX}" height="{high}" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none">'
        f'<image width="{columns}" height="{rows}" preserveAspectRatio="none"'
        f' href="{_jpeg(to_rgb8(revisit, 0, white))}"/>'
        f'<g fill="none" stroke="#fff" stroke-width="{columns / THUMBNAIL_PX:.3g}">{squares}</g></svg>'
    )
    image = f'<img width="{THUMBNAIL_PX}" height="{high}" alt="" src="{_jpeg(to_rgb8(target, 0, white))}">'
    return (
        f"<figure>{grid}<figcaption>clearest revisit, chips</figcaption></figure>"
        f"<figure>{image}<figcaption>target</figcaption></figure>"
    )


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _histograms(index: Index, sample: Sample) -> str:
    """Draw the histogram of each band, of all revisits (grey) and of the target (line), without pixels without data."""
    step, bands = index.preparation.step, index.facts.bands
    lr, hr = sample.lr.swapaxes(0, 1).reshape(len(bands.lr), -1), sample.hr.reshape(len(bands.hr), -1)
    found = []
    for name in list(dict.fromkeys((*bands.hr, *bands.lr)))[:MOST_BANDS]:
        low = lr[bands.lr.index(name)] if name in bands.lr else None
        high = hr[bands.hr.index(name)] if name in bands.hr else None
        known = [_known(values) for values in (low, high) if values is not None]
        top = max((float(np.percentile(values, 99)) for values in known if values.size), default=0.0) or 1.0
        shapes = [
            _curve(values, top, style)
            for values, style in ((low, 'fill="#bbb"'), (high, 'fill="none" stroke="#b03060" stroke-width="1.5"'))
            if values is not None
        ]
        found.append(
            f'<figure><svg width="150" height="60" viewBox="0 0 {BINS} 60" preserveAspectRatio="none">{"".join(shapes)}'
            f"</svg><figcaption>{_text(name)}, 0 to {top * step:.3g}</figcaption></figure>"
        )
    return "".join(found)


def _curve(values: NDArray[Any], top: float, style: str) -> str:
    counts, _ = np.histogram(_known(values), BINS, (0, top))
    heights = 58 - 56 * counts / max(1, counts.max())
    points = " ".join(f"{x},{y:.0f}" for x, y in enumerate(heights))
    return f'<polyline vector-effect="non-scaling-stroke" points="0,59 {points} {BINS - 1},59" {style}/>'


def _known(values: NDArray[Any]) -> NDArray[Any]:
    known: NDArray[Any] = values[(values > 0) & np.isfinite(values)]
    return known


def _text(value: object) -> str:
    text = "" if value is None else str(value)
    return html.escape(text if len(text) <= LONGEST else text[: LONGEST - 3] + "...")
