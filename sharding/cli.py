"""The verbs `download`, `shard` and `inspect`."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sharding.download import DEFAULT_KEYS, download, parse_only
from sharding.errors import UserError
from sharding.picture import Tile, robust_high, sheet, to_rgb8
from sharding.schema import SPLITS, STEP, Index, Sample, read_sample
from sharding.splits import SHARD_SIZE, SPLIT_SEED
from sharding.storage import Storage, open_storage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NO_DATA = 255
"""Of a cloud mask; see `sharding.schema.Sample`."""

MAX_DEFAULT_WORKERS = 8
SHEET_ROWS = 12
TILE_PX = 200


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `download`, `shard` and `inspect` to the command."""
    _add_download(verbs)
    shard = verbs.add_parser(
        "shard",
        help="make a dataset of WebDataset shards from WorldStrat rasters",
        description="Prepare every AOI of a WorldStrat folder and write shards and an index to a folder or bucket.",
    )
    shard.add_argument("--input", required=True, metavar="DIR", help="folder with hr_dataset/ and lr_dataset/")
    shard.add_argument("--output", required=True, metavar="URI", help="local folder or s3://BUCKET/PREFIX")
    workers = min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1)
    shard.add_argument(
        "--workers", type=int, default=workers, metavar="N", help="processes side by side (default: %(default)s)"
    )
    shard.add_argument(
        "--hr",
        default="ps",
        metavar="{ps,rgbn}",
        help="SPOT raster of the targets: 1.5 m or 6 m (default: %(default)s)",
    )
    shard.add_argument(
        "--revisits", type=int, default=8, metavar="R", help="Sentinel-2 images a sample (default: %(default)s)"
    )
    shard.add_argument(
        "--split",
        default="auto",
        metavar="{auto,published,seeded}",
        help="auto (the default): the split file where there is one",
    )
    shard.add_argument(
        "--seed", type=int, default=SPLIT_SEED, metavar="N", help="of the seeded split (default: %(default)s)"
    )
    shard.add_argument(
        "--shard-size", type=int, default=SHARD_SIZE, metavar="N", help="most AOIs a shard (default: %(default)s)"
    )
    shard.add_argument("--strict", action="store_true", help="refuse a folder with an unusable AOI")
    shard.set_defaults(run=run_shard)

    inspect = verbs.add_parser(
        "inspect",
        help="print what a dataset holds, and draw a contact sheet",
        description="Print splits, shards, statistics and skipped AOIs of a dataset.",
    )
    inspect.add_argument("uri", metavar="URI", help="local folder or s3://BUCKET/PREFIX with an index.json")
    inspect.add_argument("--png", type=Path, metavar="FILE", help=f"draw up to {SHEET_ROWS} AOIs: revisits, PAN and HR")
    inspect.set_defaults(run=run_inspect)


def _add_download(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "download",
        help="fetch WorldStrat's published files, and go on where it broke off",
        description="Fetch files of WorldStrat v1.1 (https://zenodo.org/records/15382551) and check their SHA-256. "
        "The same command goes on after an interruption.",
    )
    verb.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder, made where there is none")
    verb.add_argument(
        "--only",
        default=",".join(DEFAULT_KEYS),
        metavar="LIST",
        help="of metadata, split, hr (41 GB), l2a (25 GB), l1c (26 GB; only when asked for); default: %(default)s",
    )
    verb.add_argument("--mirror", metavar="URL", help="http(s):// folder with the same file names, not Zenodo")
    verb.set_defaults(run=run_download)


def run_download(args: argparse.Namespace) -> int:
    """Run `download`."""
    download(args.to, parse_only(args.only), mirror=args.mirror)
    print(f"now: satfusion shard --input {args.to} --output URI")
    return 0


def run_shard(args: argparse.Namespace) -> int:
    """Run `shard`."""
    # Here, not above: every other verb must run without rasterio.
    from sharding.shard import ShardOptions, shard_folder

    options = ShardOptions(
        hr_source=args.hr,
        revisits=args.revisits,
        split=args.split,
        seed=args.seed,
        shard_size=args.shard_size,
        strict=args.strict,
    )
    storage = open_storage(args.output)
    index = shard_folder(Path(args.input), storage, options, args.workers, say=print)
    for line in describe(index, storage):
        print(line)
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Run `inspect`."""
    storage = open_storage(args.uri)
    index = Index.load(storage)
    for line in describe(index, storage):
        print(line)
    if args.png is not None:
        draw(index, storage, args.png)
        print(f"contact sheet: {args.png} (* marks the clearest revisit)")
    return 0


def describe(index: Index, storage: Storage) -> Iterator[str]:
    """Yield the lines that tell a person what a dataset holds."""
    preparation = index.preparation
    seed = f", seed {index.split_seed}" if index.split_rule == "seeded" else ""
    yield f"dataset {storage.uri}"
    yield f"index   sha256 {index.digest}"
    yield (
        f"samples {preparation['revisits']} revisits, S2 bands {preparation['bands']}, LR {preparation['lr_size']} px, "
        f"HR {preparation['hr_size']} px from _{preparation['hr_source']}, integers of {preparation['step']:g}"
    )
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
        ):
            yield f"  {image:3}  {name:4}  {'  '.join(f'{value:.4f}' for value in values)}"
    yield f"skipped {len(index.skipped)} AOIs"
    for item in index.skipped:
        yield f"  {item.aoi}  {item.reason}: {item.detail}"


def draw(index: Index, storage: Storage, path: Path) -> None:
    """Draw a contact sheet: a row an AOI with its revisits (the clearest is starred), PAN and HR.

    Raises:
        UserError: when the file cannot be written, or a sample is damaged.
    """
    entries = [(split, *pair) for split in SPLITS for pair in index.samples(split)]
    rows = [
        _row(split, read_sample(storage, shard, entry)) for split, shard, entry in itertools.islice(entries, SHEET_ROWS)
    ]
    page = sheet(rows, tile_size=TILE_PX)
    try:
        page.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --png {path} ({error}): give a writable file that ends in .png") from error


def _row(split: str, sample: Sample) -> list[Tile]:
    hr = sample.hr * STEP
    white = robust_high(hr)
    # One stretch for the whole row: differences of brightness between the sensors are to be seen.
    revisits = zip(sample.lr, sample.clm, cast(list[dict[str, object]], sample.meta["revisits"]), strict=True)
    tiles: list[Tile] = []
    for number, (image, clm, revisit) in enumerate(revisits):
        label = f"{split}: {sample.aoi}" if number == 0 else f"{revisit['date']}, {_cloud(clm):.0f}% cloud"
        mark = "* " if number == sample.meta["clearest"] else ""
        tiles.append((mark + label, to_rgb8(image[:3] * STEP, 0.0, white)))
    return [*tiles, ("PAN", to_rgb8(sample.pan * STEP, 0.0, white)), ("HR", to_rgb8(hr, 0.0, white))]


def _cloud(clm: NDArray[np.uint8]) -> float:
    """Return the percentage of cloud among the pixels of a mask that have data."""
    seen = clm[clm != _NO_DATA]
    return 100 * float((seen == 1).mean()) if seen.size else 0.0
