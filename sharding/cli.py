"""The verbs `download`, `describe`, `shard`, `verify`, `inspect` and `prune`."""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import TYPE_CHECKING

from sharding.arguments import add_options, add_path, read_options
from sharding.download.worldstrat import DEFAULT_KEYS, download, parse_only
from sharding.errors import UserError
from sharding.format.index import Index
from sharding.format.sample import fetch_sample
from sharding.inspection.describe import SHEET_ROWS, describe, describe_sample, draw, find
from sharding.inspection.page import write_html
from sharding.names import local_path
from sharding.prepare.options import SampleOptions
from sharding.run.job import ShardJob, ShardOptions
from sharding.run.named_file import check_page, check_report, check_sheet, write_report
from sharding.run.plan import PlanOptions
from sharding.run.prune import prune, unneeded
from sharding.run.workers import processes
from sharding.schema import check_range
from sharding.sources.options import SourceOptions
from sharding.storage import LocalStorage, Storage, StorageOptions, open_storage
from sharding.terminal import say

if TYPE_CHECKING:
    from sharding.run.dataset import Runner

MAX_DEFAULT_WORKERS = 8


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `download`, `describe`, `shard`, `verify`, `inspect` and `prune` to the command."""
    _add_download(verbs)
    _add_describe(verbs)
    _add_shard(verbs)
    _add_verify(verbs)
    _add_inspect(verbs)
    _add_prune(verbs)


def _add_shard(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "shard",
        help="make a dataset of WebDataset shards from WorldStrat or your own rasters",
        description="Prepare every scene of a source, and write shards and an index to a folder or bucket. "
        "The same command resumes after an interruption and repairs damaged shards.",
    )
    add_options(verb, ShardJob)
    add_options(verb, ShardOptions)
    add_options(verb.add_argument_group("source"), SourceOptions)
    sample = verb.add_argument_group("samples")
    add_options(sample, SampleOptions)
    sample.add_argument("--native", action="store_true", help="keep the grids of the sources; their sizes differ")
    add_options(verb.add_argument_group("splits and shards"), PlanOptions)
    add_options(verb.add_argument_group("s3:// output"), StorageOptions)
    verb.set_defaults(run=lambda args: run_shard(shard_job(args)))


def _add_describe(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "describe",
        help="write a scenes.toml for your own GeoTIFFs, Sentinel-2 and DIMAP products",
        description="Look at a folder of GeoTIFFs and products of Sentinel-2 (.SAFE, zips) or in DIMAP, and print "
        "what they are as a scenes.toml; open questions are comments. Save it in the folder, answer them, then run "
        "`satfusion shard --source scenes`.",
    )
    verb.add_argument("folder", type=partial(local_path, "FOLDER"), metavar="FOLDER", help="folder of the files")
    verb.add_argument("--write", action="store_true", help="write FOLDER/scenes.toml; an existing one is kept")
    verb.set_defaults(run=run_describe)


def _add_verify(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "verify",
        help="compare a dataset with its index",
        description="Compare every shard's size and SHA-256 with the index. Status 1 if anything differs.",
    )
    _add_dataset(verb)
    verb.add_argument("--deep", action="store_true", help="also decode each sample, and compare some with --input")
    add_path(verb, "--input", "DIR", "with --deep: prepare some AOIs again and compare")
    verb.add_argument(
        "--num-aois", type=int, default=5, metavar="N", help="number of these AOIs (default: %(default)s)"
    )
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="seed of their choice (default: %(default)s)")
    verb.set_defaults(run=run_verify)


def _add_inspect(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "inspect",
        help="print the contents of a dataset, and draw a contact sheet",
        description="Print splits, shards, statistics and skipped AOIs of a dataset, or the details of one AOI.",
    )
    _add_dataset(verb)
    verb.add_argument("--aoi", metavar="NAME", help="print and draw only this AOI")
    add_path(verb, "--png", "FILE", f"draw up to {SHEET_ROWS} AOIs: revisits, PAN and HR")
    text = "write a page of the whole dataset: footprints, and the grid, bands, histograms and agreement of each AOI"
    add_path(verb, "--html", "FILE", text)
    verb.set_defaults(run=run_inspect)


def _add_prune(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "prune",
        help="remove earlier datasets that `shard --overwrite` replaced",
        description="Remove the shards that the published index.json does not list, and print what was removed. A run "
        "that still reads them fails. Files that this program did not write stay.",
    )
    _add_dataset(verb)
    verb.set_defaults(run=run_prune)


def _add_dataset(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("uri", metavar="URI", help="local folder or s3://BUCKET/PREFIX with an index.json")


def _add_download(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "download",
        help="download WorldStrat's published files; resumes after an interruption",
        description="Download files of WorldStrat v1.1 (https://zenodo.org/records/15382551) and check their SHA-256. "
        "After an interruption the same command resumes.",
    )
    add_path(verb, "--to", "DIR", "folder; created if it does not exist", required=True)
    verb.add_argument(
        "--only",
        default=",".join(DEFAULT_KEYS),
        metavar="LIST",
        help="of metadata, split, hr (41 GB), l2a (25 GB), l1c (26 GB; only if named); default: %(default)s",
    )
    verb.add_argument(
        "--mirror", metavar="URL", help="http(s):// folder with the same file names, used instead of Zenodo"
    )
    verb.set_defaults(run=run_download)


def run_download(args: argparse.Namespace) -> int:
    """Run `download`."""
    download(args.to, parse_only(args.only), mirror=args.mirror)
    say(f"now: satfusion shard --input {args.to} --output URI")
    return 0


def shard_job(args: argparse.Namespace) -> ShardJob:
    """Return the arguments of `shard` as typed options.

    Raises:
        UserError: For an invalid argument; it names the argument.
    """
    given = vars(args)
    if given["native"]:
        if given.keys() & {"lr_size", "hr_size"}:
            raise UserError("--native keeps both grids: give it without --lr-size and --hr-size")
        given = {**given, "lr_size": None, "hr_size": None}
    return read_options(ShardJob, given)


def run_shard(job: ShardJob, runner: Runner | None = None) -> int:
    """Run `shard` and print its report; ``runner`` builds the shards in place of processes of this machine."""
    # First: the worker processes load torch while the imports below load it here.
    runner = runner or processes(job.workers or min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1))
    # Here, not above: every other verb must run without rasterio.
    from sharding.run.dataset import shard_folder
    from sharding.run.planner import TooFewAoisError

    storage = open_storage(job.output, job.storage)
    if job.report:
        check_report(job.report)
    try:
        report = shard_folder(job.input, storage, job.options, say=say, runner=runner, overwrite=job.overwrite)
    except TooFewAoisError as error:
        if job.report:
            write_report(job.report, error.to_json())
        raise
    for line in (*describe(report.index, storage), *report.lines()):
        say(line)
    if job.report:
        write_report(job.report, report.to_json())
    _prune_or_hint(storage, job.prune)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Run `verify`."""
    from sharding.run.verify import verify  # needs rasterio, and other verbs must run without it

    if args.input and not args.deep:
        raise UserError("--input needs --deep: add --deep, or drop --input")
    check_range("--num-aois", args.num_aois, 1, 10**6)
    check_range("--seed", args.seed, 0, 2**63 - 1)
    found = verify(open_storage(args.uri), args.deep, args.input, args.num_aois, args.seed)
    for problem in found.problems:
        say(f"{problem.shard}: {problem.detail}")
    for leak in found.leaks:
        say(f"leak between splits: {leak}")
    say(found.summary())
    return 1 if found.problems else 0


def run_describe(args: argparse.Namespace) -> int:
    """Run `describe`."""
    from sharding.sources.scenes.describe import describe_folder  # needs rasterio, and other verbs must run without it

    text = describe_folder(args.folder)
    if not args.write:
        for line in text.removesuffix("\n").split("\n"):
            say(line)
        return 0
    path = args.folder / "scenes.toml"
    if not LocalStorage(args.folder).create(path.name, text.encode()):
        raise UserError(f"{path} exists: move it away, or run without --write to print the draft")
    say(f"written: {path}; check the lines with a question mark")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Run `inspect`."""
    storage = open_storage(args.uri)
    index = Index.load(storage)
    if args.png is not None:
        check_sheet(args.png)
    if args.html is not None:
        check_page("--html", args.html)
    if args.html is not None and args.aoi is not None:
        raise UserError("--html is a page of the whole dataset: give it without --aoi")
    if args.aoi is not None:
        split, shard, entry = find(index, args.aoi)
        lines = describe_sample(split, shard, fetch_sample(storage, shard, entry), index.facts.bands.lr_rgb)
    else:
        lines = describe(index, storage)
    for line in lines:
        say(line)
    if args.png is not None:
        draw(index, storage, args.png, args.aoi)
        say(f"contact sheet: {args.png} (* marks the clearest revisit)")
    if args.html is not None:
        left_out = write_html(index, storage, args.html)
        say(f"page: {args.html}" + (f", without {left_out} AOIs that agree best" if left_out else ""))
    return 0


def run_prune(args: argparse.Namespace) -> int:
    """Run `prune`."""
    _prune_or_hint(open_storage(args.uri), True)
    return 0


def _prune_or_hint(storage: Storage, removes: bool) -> None:
    for line in prune(storage).lines() if removes else filter(None, [unneeded(storage)]):
        say(line)
