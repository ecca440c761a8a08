"""Rates of the loader beside the floors of memory and link, and beside other loaders of the same chips and samples.

``python -m benchmarks.loader [--worldstrat DIR]``; for MosaicML Streaming and LitData see ``benchmarks/peers.py``, for
the forms ``benchmarks/loader_forms.py``. Each runs in a process of its own, on one core and on two; rates are medians
of several rounds, in which the forms take turns. Cold: the clock starts before the dataset is opened, with an empty
cache folder, and stops after one epoch; all others had one epoch before. Files are in the page cache throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import loader_forms as forms
from benchmarks import peers
from benchmarks.loader_forms import Epoch, Images, Place, peer
from benchmarks.trees import plant
from cluster.local.objectstore import ObjectStore
from sharding.format.index import Index
from sharding.format.layout import IMAGES
from sharding.format.sample import Sample, fetch_sample
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.storage import open_storage

SHARD_BYTES = 64 << 20
LEAST_SECONDS = 1.5
FRESH_BYTES = 7 << 29
"""Upper bound of the seconds of a cold form, with files in the page cache too."""


@dataclass(frozen=True)
class Form:
    """A way to read the chips, and the way it is timed."""

    open: Callable[[Place], Epoch]
    cold: bool = False
    """Whether the clock starts before it is opened."""
    first: bool = False
    """Whether the clock includes the first epoch."""
    workers: bool = False
    """Whether it may have worker processes on two cores."""
    alone: bool = False
    """Whether it has one thread only, so that a second core does not help."""


mosaicml, litdata = forms.mosaicml_chips, forms.litdata_chips
FORMS = {
    "floor: read, copy": Form(partial(forms.floor, check=False)),
    "floor: read, CRC-32, copy": Form(partial(forms.floor, check=True)),
    "floor in order: read, copy": Form(partial(forms.floor_in_order, check=False), alone=True),
    "floor in order: read, CRC-32, copy": Form(partial(forms.floor_in_order, check=True), alone=True),
    "ours, checks off": Form(forms.ours_unchecked),
    "ours": Form(partial(forms.ours, evict=True)),
    "ours, from the disk cache": Form(partial(forms.ours_cached, evict=True)),
    "ours, scenes in memory": Form(forms.ours),
    "ours, floats": Form(partial(forms.ours, evict=True, turns=True)),
    "ours, first epoch": Form(forms.ours, cold=True),
    "ours, cold": Form(partial(forms.ours_cached, evict=False), cold=True),
    "WebDataset": Form(partial(peer, open_chips=forms.webdataset_chips), workers=True),
    "MosaicML": Form(partial(peer, open_chips=partial(mosaicml, cold=False)), workers=True),
    "MosaicML, cold": Form(partial(peer, open_chips=partial(mosaicml, cold=True)), cold=True, workers=True),
    "LitData": Form(partial(peer, open_chips=partial(litdata, cold=False)), workers=True),
    "LitData, cold": Form(partial(peer, open_chips=partial(litdata, cold=True)), cold=True, workers=True),
    "published": Form(forms.published),
    "S3: ranged GETs": Form(forms.ranged_gets, first=True),
    "S3: ours": Form(partial(forms.ours_s3, evict=True)),
    "S3: ours, first epoch": Form(forms.ours_s3, first=True),
    "S3: ours, filling a disk cache": Form(partial(forms.ours_s3, cached=True), first=True),
}

CLAIMS = [
    ("ours, checks off", "floor: read, copy", 0.7),
    ("ours, checks off", "floor in order: read, copy", 0.7),
    ("ours, scenes in memory", "floor: read, copy", 0.7),
    ("ours", "floor: read, CRC-32, copy", 0.9),
    ("ours", "floor in order: read, CRC-32, copy", 0.9),
    ("ours", "WebDataset", 4),
    ("ours, scenes in memory", "WebDataset", 4),
    ("ours", "MosaicML", 1),
    ("ours, scenes in memory", "MosaicML", 1),
    ("ours, cold", "MosaicML, cold", 1),
    ("ours, first epoch", "MosaicML, cold", 1),
    ("ours", "LitData", 1),
    ("ours, scenes in memory", "LitData", 1),
    ("ours, cold", "LitData, cold", 1),
    ("ours, first epoch", "LitData, cold", 1),
    ("ours, first epoch", "published", 30),
    ("S3: ours", "S3: ranged GETs", 0.85),
    ("S3: ours, first epoch", "S3: ranged GETs", 0.85),
]
"""Required ratios of one form's rate to another's."""

Case = tuple[str, int, int]
"""A form, cores, worker processes."""


def measure(form: Form, place: Place) -> dict[str, float]:
    """Return chips per second and, for warm forms, the sum of an epoch's values; call it in a fresh process."""
    sums: list[int] = []

    def add(batch: Images) -> None:
        stored = (image for image in map(np.asarray, batch) if image.dtype == np.uint16)
        sums.append(sum(int(image.sum(dtype=np.uint64)) for image in stored))

    def ignore(_: Images) -> None:
        pass

    once = form.cold or form.first
    if once:
        take_memory()
    start = time.perf_counter()
    epoch = form.open(place)
    if not once:
        epoch(0, add)
    if not form.cold:
        start = time.perf_counter()
    chips = number = 0
    while number == 0 or not (once or time.perf_counter() - start > LEAST_SECONDS):
        number += 1
        chips += epoch(number, ignore)
    return {"rate": chips / (time.perf_counter() - start), "sum": sum(sums)}


def take_memory() -> None:
    """Allocate memory and free it: on a virtual machine, the host is slow to supply memory that was never used."""
    np.empty(FRESH_BYTES, np.uint8)[::4096] = 1


def prepare(folder: Path, worldstrat: Path | None, aois: int) -> None:
    """Make the tree, its shards and the peers' copies of the training split, unless they exist."""
    made = folder / "made.json"
    wanted = json.dumps([str(worldstrat), aois])
    if made.exists():
        if made.read_text() != wanted:
            sys.exit(f"{folder} holds other samples: name another folder")
        return
    plant(folder / "tree", aois, worldstrat)
    dataset = open_storage(folder / "dataset")
    shard_folder(folder / "tree", dataset, ShardOptions(), say=lambda _: None)
    places = Index.load(dataset).samples("train")
    if 9 * len(places) % forms.BATCH:
        sys.exit(f"{len(places)} AOIs to train fill no whole batches: let --aois be a multiple of 40")
    samples = (fetch_sample(dataset, *place) for place in places)
    write_peers(folder, samples)
    made.write_text(wanted)


def write_peers(folder: Path, samples: Iterable[Sample]) -> None:
    """Write samples as MDS shards and as LitData's chunks: everything in ours, uncompressed, without hashes."""
    from litdata.streaming.writer import BinaryWriter
    from streaming import MDSWriter

    shapes = {name: f"ndarray:uint16:{','.join(map(str, size))}" for name, size in forms.SIZES.items()}
    columns = {"aoi": "str", **shapes, "clm": "ndarray:uint8:8,1,160,160", "json": "json"}
    chunks = BinaryWriter(str(folder / "litdata"), chunk_bytes=SHARD_BYTES)
    with MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=SHARD_BYTES) as shards:
        for number, sample in enumerate(samples):
            images = {name: getattr(sample, name) for name in IMAGES}
            shards.write({"aoi": sample.aoi, **images, "json": sample.meta})
            chunks[number] = {"aoi": sample.aoi, **images, "json": json.dumps(sample.meta)}
    chunks.done()
    chunks.merge()


def run(case: Case, folder: Path) -> dict[str, float]:
    """Measure one case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loader", "--folder", str(folder), "--one", json.dumps(case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case} failed")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_here(case: Case, folder: Path) -> None:
    """Measure one case on its number of cores, and print the result."""
    name, cores, workers = case
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(cores)
    (folder / "caches").mkdir(exist_ok=True)
    cache = Path(tempfile.mkdtemp(dir=folder / "caches"))
    print(json.dumps(measure(FORMS[name], Place(folder, cache, cores, workers))))
    # Not removed before the end: ext4 checks each inode that was freed in the last minutes for every new file.
    for path in cache.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)


def run_all(folder: Path, names: Sequence[str], rounds: int) -> dict[Case, float]:
    """Return the median rates, after a check that all warm forms delivered the same."""
    cases = [(name, 1, 0) for name in names]
    two = [name for name in names if not FORMS[name].alone]
    cases += [(name, 2, workers) for name in two for workers in (range(3) if FORMS[name].workers else [0])]
    results: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            results[case].append(run(case, folder))
            print(f"round {number + 1}: {case} {results[case][-1]['rate']:.0f} chips/s", file=sys.stderr, flush=True)
    sums = {result["sum"]: case for case, each in results.items() for result in each if result["sum"]}
    if len(sums) > 1:
        sys.exit(f"these did not deliver the same: {', '.join(map(str, sums.values()))}")
    return {case: statistics.median(result["rate"] for result in each) for case, each in results.items()}


def report(rates: dict[Case, float]) -> None:
    """Print all rates, and the required ratios."""
    best: dict[tuple[str, int], float] = {}
    print(f"{'':34}{'cores':>6}{'workers':>9}{'chips/s':>10}{'MB/s':>8}")
    for (name, cores, workers), rate in sorted(rates.items(), key=lambda item: list(FORMS).index(item[0][0])):
        print(f"{name:34}{cores:>6}{workers or '':>9}{rate:>10.0f}{rate * forms.CHIP_BYTES / 1e6:>8.0f}")
        best[name, cores] = max(rate, best.get((name, cores), 0))
    print(f"\n{'':64}{'asked':>8}{'one core':>12}{'two cores':>12}")
    for form, other, least in CLAIMS:
        ratios = [
            best[form, cores] / best[other, cores] if {(form, cores), (other, cores)} <= best.keys() else None
            for cores in (1, 2)
        ]
        if any(ratios):
            marks = "".join(f"{ratio:>9.2f}x {'+-'[ratio < least]}" if ratio else " " * 12 for ratio in ratios)
            print(f"{form + ' / ' + other:64}{least:>7}x{marks}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worldstrat", type=Path, help="a WorldStrat folder (default: generated AOIs)")
    parser.add_argument("--aois", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder of the samples, made and reused (default: temporary)")
    parser.add_argument("--only", nargs="+", default=[""], help="prefixes of the names of forms (default: all)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
    peers.enable()
    if options.one:
        run_here(json.loads(options.one), options.folder)
        return
    names = [name for name in FORMS if name.startswith(tuple(options.only))]
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare(folder, options.worldstrat, options.aois)
        if any(name.startswith("S3") for name in names):
            store = stack.enter_context(ObjectStore(Path(stack.enter_context(tempfile.TemporaryDirectory())), "bench"))
            os.environ.update(store.environment, LOADER_S3_URI="s3://bench/dataset")
            target = open_storage(os.environ["LOADER_S3_URI"])
            for path in (folder / "dataset").iterdir():
                target.upload(path.name, path)
        try:
            report(run_all(folder, names, options.rounds))
        finally:
            shutil.rmtree(folder / "caches", ignore_errors=True)


if __name__ == "__main__":
    main()
