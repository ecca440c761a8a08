"""Wait of two training ranks for data, and memory over twenty epochs.

``python -m benchmarks.datawait [--worldstrat DIR]``: two ranks of one thread each train on the CPU through
`pipeline.training.loop`, from a local folder and from an S3 server. Memory holds fewer scenes than there are, so every
epoch reads from the store again. The wait is the mean over both ranks, its share that of the time of all steps; the
very first step, before which nothing could be prefetched, is reported apart. Memory is the resident memory after each
epoch's validation, before and after the C library returns its freed memory to the system; all threads share one arena,
the only one whose free end is returned. Then a loader alone runs through twenty epochs.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.trees import plant
from cluster.local.objectstore import ObjectStore
from cluster.logs import configure_logging
from pipeline.config import RunConfig, load_config
from pipeline.data import ChipDataset, TrainLoader, evaluation_batches
from pipeline.order import BatchPlan
from pipeline.training.loop import run_training
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.storage import open_storage

RANKS = 2
OPTIONS = (
    "model.hidden=8",
    "data.random_windows=true",
    "data.loader_threads=2",
    "train.global_batch=8",
    "train.checkpoint_every=1000000",
    "train.log_every=1",  # `waits` takes a row for a step
    "train.threads_per_rank=1",
    "output.panels=0",
)
AFTER = 2
"""The epoch after which memory is compared."""


def resident() -> str:
    """Return this process's resident memory, MiB: before and after freed memory is returned to the system."""

    def now() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    as_it_is = now()
    ctypes.CDLL(None).malloc_trim(0)
    return f"{as_it_is:.1f} {now():.1f}"


def configuration(uri: str, output: Path, options: argparse.Namespace) -> RunConfig:
    """Return the run's configuration."""
    own = (f"data.uri={uri}", f"output.uri={output}", f"data.cache_mib={options.cache_mib}")
    return load_config(options.recipe, [*own, *OPTIONS, f"train.epochs={options.epochs}", *options.option])


def train_here(config: Path) -> None:
    """Train as one rank, and write the resident memory after each epoch beside the configuration."""
    rank = os.environ["RANK"]
    configure_logging(int(rank))
    with config.with_name(f"resident-{rank}").open("w", buffering=1) as file:
        run_training(load_config(str(config)), lambda _: print(resident(), file=file))


def load_here(config: Path) -> None:
    """Run the epochs of a loader alone, and of the validation, and write the resident memory after each."""
    run = load_config(str(config))
    torch.set_num_threads(1)
    dataset = ChipDataset(run.data.uri, "train", run.data)
    loader = TrainLoader(dataset, BatchPlan.create(run.train.global_batch, 0, 1), 0, run.train.seed)
    with config.with_name("resident-0").open("w", buffering=1) as file:
        for _ in range(run.train.epochs):
            for _ in loader:
                pass
            for _ in evaluation_batches(dataset.sibling("val")):
                pass
            print(resident(), file=file)


def memory(folder: Path, ranks: int) -> str:
    """Return the memory of each rank as text."""
    parts = []
    for rank in range(ranks):
        rows = [line.split() for line in (folder / f"resident-{rank}").read_text().splitlines()]
        whole, held = ([float(row[column]) for row in rows][AFTER - 1 :] for column in (0, 1))
        parts.append(
            f"rank {rank}: {held[0]:.0f} MiB after epoch {AFTER}, {held[-1]:.0f} after epoch {len(rows)}"
            f" ({100 * (held[-1] / held[0] - 1):+.1f} %, target: within 3 %), {min(held):.0f} to {max(held):.0f};"
            f" with what was freed {whole[0]:.0f} and {whole[-1]:.0f}, {min(whole):.0f} to {max(whole):.0f}"
        )
    return "\n".join(parts)


def waits(rows: Sequence[Mapping[str, str]], batch: int) -> str:
    """Return the share of waiting in the time of steps, from the rows of metrics.csv, one for each step."""
    seconds = [batch / float(row["time/chips_per_second"]) for row in rows]
    waited = [float(row["time/data_wait_seconds"]) for row in rows]
    share = 100 * sum(waited[1:]) / sum(seconds[1:])
    longest = sorted(waited[1:])[-3:]
    return (
        f"data wait {share:.3f} % of step time (asked: <= 1 %) over {len(rows) - 1} steps of"
        f" {1e3 * statistics.median(seconds):.0f} ms; median {1e3 * statistics.median(waited):.2f} ms,"
        f" longest {', '.join(f'{1e3 * wait:.0f}' for wait in longest)} ms; first step {1e3 * waited[0]:.0f} ms"
        f" of {1e3 * seconds[0]:.0f}"
    )


def launch(mode: str, config: Path) -> None:
    """Run this script in processes of its own."""
    module = ["-m", "benchmarks.datawait", mode, str(config)]
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command = [sys.executable, *(ranks if mode == "--train" else []), *module]
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment)
        log.seek(0)
        if done.returncode:
            sys.exit(log.read())


def report(name: str, uri: str, folder: Path, options: argparse.Namespace) -> None:
    """Train from one place, then load from it alone, and print the results."""
    folder.mkdir()
    run = folder / "run"
    config = folder / "config.toml"
    config.write_text(configuration(uri, run, options).to_toml())
    launch("--train", config)
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    print(f"{name}: {waits(rows, load_config(str(config)).train.global_batch)}\n{memory(folder, RANKS)}", flush=True)
    launch("--load", config)
    print(f"{name}, the loader alone:\n{memory(folder, 1)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worldstrat", type=Path, help="a WorldStrat folder (default: generated AOIs)")
    parser.add_argument("--aois", type=int, default=20)
    parser.add_argument("--recipe", default="srcnn_pnn")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--cache-mib", type=int, default=0, help="data.cache_mib (default: %(default)s)")
    parser.add_argument("--only", choices=["folder", "s3"], help="leave the other out")
    parser.add_argument("option", nargs="*", help="further overrides, section.key=value")
    for mode in ("--train", "--load"):
        parser.add_argument(mode, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train or options.load:
        (train_here if options.train else load_here)(options.train or options.load)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plant(folder / "tree", options.aois, options.worldstrat)
        dataset = open_storage(folder / "dataset")
        shard_folder(folder / "tree", dataset, ShardOptions(), say=lambda _: None)
        if options.only != "s3":
            report("local folder", str(folder / "dataset"), folder / "from-folder", options)
        if options.only != "folder":
            (folder / "store").mkdir()
            with ObjectStore(folder / "store", "bench") as store:
                os.environ.update(store.environment)
                target = open_storage("s3://bench/dataset")
                for stored in dataset.list():
                    target.upload(stored.key, folder / "dataset" / stored.key)
                report("S3", "s3://bench/dataset", folder / "from-s3", options)


if __name__ == "__main__":
    main()
