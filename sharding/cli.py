"""The verbs `download`, `shard`, `verify` and `inspect`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.download.worldstrat import DEFAULT_KEYS, download, parse_only
from sharding.errors import UserError
from sharding.format.index import Index
from sharding.format.sample import fetch_sample
from sharding.prepare.options import HR_SIZE, LR_SIZE, SampleOptions
from sharding.run.inspection import SHEET_ROWS, describe, describe_sample, draw, find
from sharding.run.plan import SHARD_BYTES, PlanOptions
from sharding.run.splits import FRACTIONS, SPLIT_SEED
from sharding.run.workers import processes
from sharding.storage import open_storage
from sharding.storage.options import add_storage_arguments, storage_options

if TYPE_CHECKING:
    from sharding.run.dataset import Report, Runner, ShardOptions

MAX_DEFAULT_WORKERS = 8
MB = 1_000_000


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `download`, `shard`, `verify` and `inspect` to the command."""
    _add_download(verbs)
    _add_shard(verbs)
    _add_verify(verbs)
    _add_inspect(verbs)


def _add_shard(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "shard",
        help="make a dataset of WebDataset shards from WorldStrat rasters",
        description="Prepare every AOI of a WorldStrat folder, or of its zips in place, and write shards and an index "
        "to a folder or bucket. The same command goes on after an interruption, and mends what is damaged.",
    )
    verb.add_argument(
        "--input", required=True, type=Path, metavar="DIR", help="holds hr_dataset/ and lr_dataset/, or their zips"
    )
    verb.add_argument("--output", required=True, metavar="URI", help="local folder or s3://BUCKET/PREFIX")
    verb.add_argument(
        "--workers", type=int, metavar="N", help=f"shards side by side (default: the CPUs, here {_workers()})"
    )
    verb.add_argument("--aois", type=Path, metavar="FILE", help="take only the AOIs that FILE names, one a line")
    verb.add_argument("--strict", action="store_true", help="refuse an input with an unusable AOI")
    verb.add_argument(
        "--overwrite", action="store_true", help="replace a dataset of another source or other options in --output"
    )
    verb.add_argument("--report", type=Path, metavar="FILE", help="write what was done as JSON")
    sample = verb.add_argument_group("samples")
    sample.add_argument("--level", default="l2a", metavar="{l2a,l1c}", help="Sentinel-2 product (default: %(default)s)")
    sample.add_argument(
        "--bands", default="true_color", metavar="{true_color,all}", help="of Sentinel-2 (default: %(default)s)"
    )
    sample.add_argument("--revisits", type=int, default=8, metavar="R", help="images a sample (default: %(default)s)")
    sample.add_argument(
        "--select", default="first", metavar="{first,clearest}", help="which revisits (default: %(default)s)"
    )
    sample.add_argument(
        "--max-cloud", type=float, metavar="PERCENT", help="leave out AOIs whose revisits are cloudier on average"
    )
    sample.add_argument(
        "--hr",
        default="ps",
        metavar="{ps,rgbn}",
        help="SPOT raster of the targets: 1.5 m or 6 m (default: %(default)s)",
    )
    sample.add_argument("--lr-size", type=int, metavar="PX", help=f"side of the LR grid (default: {LR_SIZE})")
    sample.add_argument("--hr-size", type=int, metavar="PX", help=f"side of the HR grid (default: {HR_SIZE})")
    sample.add_argument("--native", action="store_true", help="keep the sources' grids, whose sizes differ")
    sample.add_argument(
        "--dtype", default="uint16", metavar="{uint16,float32}", help="of stored images (default: %(default)s)"
    )
    plan = verb.add_argument_group("splits and shards")
    plan.add_argument(
        "--splits", default="auto", metavar="{auto,published,seeded}", help="auto (the default): the split file if any"
    )
    plan.add_argument(
        "--fractions", type=_fractions, default=FRACTIONS, metavar="TRAIN,VAL,TEST", help="default: 0.8,0.1,0.1"
    )
    plan.add_argument(
        "--seed", type=int, default=SPLIT_SEED, metavar="N", help="of the seeded split (default: %(default)s)"
    )
    plan.add_argument(
        "--shard-size", type=float, default=SHARD_BYTES / MB, metavar="MB", help="at most (default: %(default)g)"
    )
    plan.add_argument(
        "--for-ranks", type=int, default=1, metavar="N", help="make a multiple of N training shards (default: 1)"
    )
    add_storage_arguments(verb)
    verb.set_defaults(run=run_shard)


def _add_verify(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "verify",
        help="compare a dataset with its index",
        description="Compare every shard's size and SHA-256 with the index. Status 1 if anything differs.",
    )
    verb.add_argument("uri", metavar="URI", help="local folder or s3://BUCKET/PREFIX with an index.json")
    verb.add_argument("--deep", action="store_true", help="decode each sample too, and compare some with --input")
    verb.add_argument("--input", type=Path, metavar="DIR", help="with --deep: prepare some AOIs again and compare")
    verb.add_argument("--num-aois", type=int, default=5, metavar="N", help="how many of them (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="which of them (default: %(default)s)")
    verb.set_defaults(run=run_verify)


def _add_inspect(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "inspect",
        help="print what a dataset holds, and draw a contact sheet",
        description="Print splits, shards, statistics and skipped AOIs of a dataset, or all of one AOI.",
    )
    verb.add_argument("uri", metavar="URI", help="local folder or s3://BUCKET/PREFIX with an index.json")
    verb.add_argument("--aoi", metavar="NAME", help="print and draw this one alone")
    verb.add_argument("--png", type=Path, metavar="FILE", help=f"draw up to {SHEET_ROWS} AOIs: revisits, PAN and HR")
    verb.set_defaults(run=run_inspect)


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


def run_shard(args: argparse.Namespace, runner: Runner | None = None) -> int:
    """Run `shard`; ``runner`` does the work elsewhere than in processes of this machine."""
    # Before the rest, which loads torch here: other processes load it at the same time.
    runner = runner or processes(_or(args.workers, _workers()))
    # Here, not above: every other verb must run without rasterio.
    from sharding.run.dataset import shard_folder

    storage = open_storage(args.output, storage_options(args))
    report = shard_folder(args.input, storage, shard_options(args), say=print, runner=runner, overwrite=args.overwrite)
    for line in (*describe(report.index, storage), *report.lines()):
        print(line)
    if args.report:
        _write_report(args.report, report)
    return 0


def shard_options(args: argparse.Namespace) -> ShardOptions:
    """Return what the arguments of `shard` say.

    Raises:
        UserError: naming the one that cannot be.
    """
    from sharding.run.dataset import ShardOptions  # needs rasterio, which other verbs must do without

    if args.native and (args.lr_size or args.hr_size):
        raise UserError("--native keeps both grids: give it without --lr-size and --hr-size")
    return ShardOptions(
        sample=SampleOptions(
            level=args.level,
            bands=args.bands,
            revisits=args.revisits,
            select=args.select,
            hr=args.hr,
            lr_size=None if args.native else _or(args.lr_size, LR_SIZE),
            hr_size=None if args.native else _or(args.hr_size, HR_SIZE),
            dtype=args.dtype,
            max_cloud=args.max_cloud,
        ),
        plan=PlanOptions(
            splits=args.splits,
            fractions=args.fractions,
            seed=args.seed,
            shard_bytes=int(args.shard_size * MB),
            for_ranks=args.for_ranks,
        ),
        aois=_read_names(args.aois) if args.aois else None,
        strict=args.strict,
    )


def run_verify(args: argparse.Namespace) -> int:
    """Run `verify`."""
    from sharding.run.verify import verify  # needs rasterio, which other verbs must do without

    if args.input and not args.deep:
        raise UserError("--input is compared by --deep alone: add it, or leave --input out")
    if args.num_aois < 1:
        raise UserError(f"--num-aois {args.num_aois} is too small: the least is 1")
    found = verify(open_storage(args.uri), args.deep, args.input, args.num_aois, args.seed)
    for problem in found.problems:
        print(f"{problem.shard}: {problem.detail}")
    print(found.summary())
    return 1 if found.problems else 0


def run_inspect(args: argparse.Namespace) -> int:
    """Run `inspect`."""
    storage = open_storage(args.uri)
    index = Index.load(storage)
    if args.aoi is not None:
        split, shard, entry = find(index, args.aoi)
        lines = describe_sample(split, shard, fetch_sample(storage, shard, entry))
    else:
        lines = describe(index, storage)
    for line in lines:
        print(line)
    if args.png is not None:
        draw(index, storage, args.png, args.aoi)
        print(f"contact sheet: {args.png} (* marks the clearest revisit)")
    return 0


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _workers() -> int:
    return min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1)


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--fractions {text} cannot be: give three numbers, such as 0.8,0.1,0.1") from None


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--aois {path} cannot be read ({error}): give a text file with an AOI a line") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise UserError(f"--aois {path} names no AOI: give a text file with an AOI a line")
    return names


def _write_report(path: Path, report: Report) -> None:
    try:
        path.write_text(json.dumps(report.to_json(), indent=1, sort_keys=True), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write --report {path} ({error.strerror}): the dataset is whole; give a writable file"
        ) from error
