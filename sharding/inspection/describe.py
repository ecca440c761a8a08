"""Inspection: the contents of a dataset as lines of text and as a sheet of images."""

from __future__ import annotations

import io
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL.PngImagePlugin import PngInfo

from sharding.errors import UserError, nearest
from sharding.format.entries import SampleEntry, ShardEntry, agreement_bin
from sharding.format.index import SPLITS, Index
from sharding.format.sample import Sample, fetch_sample
from sharding.picture import Tile, robust_high, sheet, to_rgb8
from sharding.prepare.shifts import revisit_shifts
from sharding.run.groups import leaks
from sharding.run.named_file import SOFTWARE, write_file
from sharding.storage import CorruptedError, Storage

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_EMPTY = np.zeros((1, 1, 3), np.uint8)
_NO_DATA = 255
"""No-data value of a cloud mask; see `sharding.format.sample.Sample`."""

SHEET_ROWS = 12
LEAST = 3
"""Samples with the least agreement that are named."""
TILE_PX = 200


def describe(index: Index, storage: Storage) -> Iterator[str]:
    """Yield lines for the user on the contents of a dataset."""
    preparation = index.preparation
    seed = f", seed {index.split_seed}" if index.split_rule == "seeded" else ""
    yield f"dataset {storage.uri}"
    yield f"index   sha256 {index.digest}"
    lr, hr = (f"{size} px" if size else "native" for size in (preparation.lr_size, preparation.hr_size))
    stored = f"integers of {preparation.step:g}" if preparation.dtype == "uint16" else preparation.dtype
    if index.facts.source == "worldstrat":
        yield (
            f"samples {preparation.select} {preparation.revisits} revisits of {preparation.level}, bands "
            f"{', '.join(map(str, preparation.band_numbers))}, LR {lr}, HR {hr} from _{preparation.hr}, {stored}"
        )
    else:
        ratio = f", {index.facts.ratio[0]}/{index.facts.ratio[1]} PAN pixels per LR pixel" if index.facts.ratio else ""
        yield f"samples {preparation.select} {preparation.revisits} revisits{ratio}, {stored}"
    chips = index.facts.chips
    yield (
        f"format  {index.format_version}, {index.facts.source}: bands {', '.join(index.facts.bands.lr)}, of targets "
        f"{', '.join(index.facts.bands.hr)}; {chips.columns} x {chips.rows} chips of {chips.size} px a sample"
    )
    for repeat in index.repeats:
        yield f"WRONG   {repeat}: shard the dataset again"
    for leak in leaks(index):
        yield f"LEAK    {leak}"
    yield from _agreement(index)
    yield f"split   {index.split_rule}{seed}"
    for split in SPLITS:
        shards = index.splits[split]
        samples = sum(len(shard.samples) for shard in shards)
        size = sum(shard.bytes for shard in shards)
        yield f"  {split:5}  {samples:5} AOIs  {len(shards):4} shards  {size / 1e6:9.1f} MB"
        for shard in shards:
            yield f"    {shard.name}  {len(shard.samples):5} AOIs  {shard.bytes / 1e6:9.1f} MB  {shard.sha256[:12]}"
    yield "statistics of train, one number a band"
    for image, bands in index.statistics.items():
        for name, values in (
            ("mean", bands["mean"]),
            ("std", bands["std"]),
            ("min", bands["min"]),
            ("max", bands["max"]),
            *((f"p{percent}", values) for percent, values in bands["percentiles"].items()),
        ):
            yield f"  {image:3}  {name:4}  {'  '.join(f'{value:.4f}' for value in values)}"
    yield f"skipped {len(index.skipped)} AOIs"
    for reason, count in Counter(item.reason for item in index.skipped).most_common():
        yield f"  {count:5}  {reason}"
    for item in index.skipped:
        yield f"  {item.aoi}  {item.reason}: {item.detail}"


def _agreement(index: Index) -> Iterator[str]:
    """Yield a histogram of the correlation of revisits and target, and the samples with the least."""
    found = [
        (entry.content.correlation, entry.aoi)
        for split in SPLITS
        for _, entry in index.samples(split)
        if entry.content is not None and entry.content.correlation is not None
    ]
    if not found:
        return
    counts = Counter(agreement_bin(value) for value, _ in sorted(found))
    parts = (f"{name}: {count}" for name, count in counts.items())
    yield f"agreement of revisits with the target, correlation from: {', '.join(parts)}"
    for value, aoi in sorted(found)[:LEAST]:
        yield f"  {value:.3f}  {aoi}"


def find(index: Index, aoi: str) -> tuple[str, ShardEntry, SampleEntry]:
    """Return split, shard and sample entry of an AOI.

    Raises:
        UserError: If the dataset does not hold it; with the reason if it was skipped.
    """
    names = []
    for split in SPLITS:
        for shard, entry in index.samples(split):
            if entry.aoi == aoi:
                return split, shard, entry
            names.append(entry.aoi)
    for item in index.skipped:
        if item.aoi == aoi:
            raise UserError(f"--aoi {aoi!r} was skipped ({item.reason}: {item.detail})")
    raise UserError(f"--aoi {aoi!r} is not in this dataset{nearest(aoi, names)}")


def describe_sample(split: str, shard: ShardEntry, sample: Sample, rgb: Sequence[int]) -> Iterator[str]:
    """Yield lines for the user on the place and the content of one sample."""
    yield f"AOI {sample.aoi!r} in {split}, {shard.name}, key {sample.key!r}"
    yield f"  lr {list(sample.lr.shape)}, hr {list(sample.hr.shape)}, pan {list(sample.pan.shape)}, {sample.hr.dtype}"
    content = next((entry.content for entry in shard.samples if entry.key == sample.key), None)
    if content is not None:
        yield f"  agreement: {json.dumps(asdict(content))}"
    shifts = [shift and tuple(round(value, 2) for value in shift) for shift in revisit_shifts(sample.lr, rgb)]
    yield f"  shifts of the revisits against the others, LR px down and right: {json.dumps(shifts)}"
    for name, value in sample.meta.items():
        if name not in ("aoi", "sources"):
            yield f"  {name}: {json.dumps(value)}"


def draw(index: Index, storage: Storage, path: Path, aoi: str | None = None) -> None:
    """Draw a contact sheet, one row per AOI: its revisits (the clearest is starred), PAN and HR; or only ``aoi``'s row.

    A damaged sample gets an empty row, and is named in a warning.

    Raises:
        UserError: If the file cannot be written, or ``aoi``'s sample is damaged.
    """
    entries = [find(index, aoi)] if aoi else [(split, *pair) for split in SPLITS for pair in index.samples(split)]
    rows: list[list[Tile]] = []
    for split, shard, entry in itertools.islice(entries, SHEET_ROWS):
        try:
            rows.append(_row(split, fetch_sample(storage, shard, entry), index))
        except CorruptedError as error:
            if aoi:
                raise
            logger.warning("%s", error)
            rows.append([(f"damaged: {entry.aoi}", _EMPTY)])
    page, data, info = sheet(rows, tile_size=TILE_PX), io.BytesIO(), PngInfo()
    info.add_text("Software", SOFTWARE)
    page.save(data, format="PNG", pnginfo=info)
    write_file("--png", path, data.getvalue())


def _row(split: str, sample: Sample, index: Index) -> list[Tile]:
    step, rgb = index.preparation.step, list(index.facts.bands.lr_rgb)
    hr = sample.hr[list(index.facts.bands.hr_rgb)] * step
    white = robust_high(hr)
    # One stretch for the whole row: it keeps differences of brightness between the sensors visible.
    revisits = zip(sample.lr, sample.clm, cast(list[dict[str, object]], sample.meta["revisits"]), strict=True)
    tiles: list[Tile] = []
    for number, (image, clm, revisit) in enumerate(revisits):
        label = f"{split}: {sample.aoi}" if number == 0 else f"{revisit['date']}, {_cloud(clm):.0f}% cloud"
        mark = "* " if number == sample.meta["clearest"] else ""
        tiles.append((mark + label, to_rgb8(image[rgb] * step, 0.0, white)))
    return [*tiles, ("PAN", to_rgb8(sample.pan * step, 0.0, white)), ("HR", to_rgb8(hr, 0.0, white))]


def _cloud(clm: NDArray[np.uint8]) -> float:
    """Return the percentage of cloud among a mask's pixels with data; 0 without such pixels."""
    seen = clm[clm != _NO_DATA]
    return 100 * float((seen == 1).mean()) if seen.size else 0.0
