"""What a checkpoint in the background costs the steps beside it: ``python -m benchmarks.checkpoints [--rounds 3]``.

Each round trains twice in this process, pinned: the training on one core; a real S3 server, a proxy that takes
50 MB/s and the thread that writes checkpoints on the other. One of the two makes no checkpoint. Printed are the 95th
percentiles of the steps' times while a checkpoint is in flight, otherwise, and of the run without one, and what the
training would wait if it wrote the checkpoint itself.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import logging
import os
import re
import statistics
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.batch import CHIPS, SHARD, run, write_scenes
from benchmarks.results import columns
from benchmarks.slow_store import slow_store
from pipeline.config import load_config
from pipeline.reporting.run_folder import RunFolder
from pipeline.training.loop import run_training
from sharding.errors import UserError

BYTES_PER_S = 50e6
"""Rate of the store."""
BATCH = 4
"""Chips of a step. A training is one epoch, so only its end has a validation."""
SKIPPED = 20
"""First steps, which are left out: buffers are made, and caches filled."""
_WRITTEN = re.compile(r"checkpoint step-(\d+) written in ([\d.]+) s; the training waited ([\d.]+) s")


class Written(logging.Handler):
    """Checkpoints by their step: seconds until each was published, and seconds that the training waited."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[int, tuple[float, float]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Take the figures out of the saver's line."""
        if found := _WRITTEN.match(record.getMessage()):
            self.seconds[int(found[1])] = float(found[2]), float(found[3])


@contextlib.contextmanager
def checkpoints_on(core: int) -> Iterator[None]:
    """Keep the thread that writes checkpoints, and those that it starts, on one core."""
    ended = threading.Event()

    def pin() -> None:
        while not ended.wait(0.005):
            for thread in threading.enumerate():
                if thread.name.startswith("checkpoint") and thread.native_id:
                    with contextlib.suppress(OSError):
                        os.sched_setaffinity(thread.native_id, {core})
                    return

    watcher = threading.Thread(target=pin)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def train(
    data: Path, uri: str, steps: int, every: int, width: int, core: int
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Train; return times of steps beside a checkpoint, of the others, and each checkpoint's seconds and stall."""
    written = Written()
    logger = logging.getLogger("pipeline.training.saving")
    logger.addHandler(written)
    words = [
        *("train.engine=torch", "train.threads_per_rank=1", f"train.global_batch={BATCH}", "train.log_every=1"),
        *(f"train.max_steps={steps}", f"train.checkpoint_every={every}", "train.epochs=100000", "output.panels=0"),
        *(f"model.hidden={width}", "model.revisits=2"),
        *(f"data.uri={data}", f"output.uri={uri}"),
    ]
    try:
        with checkpoints_on(core):
            run_training(load_config("srcnn_pnn", words))
    finally:
        logger.removeHandler(written)
    rows = csv.DictReader(RunFolder(uri, 1).storage.read("metrics.csv").decode().splitlines())
    times = {int(row["step"]): BATCH / float(row["time/chips_per_second"]) for row in rows}
    beside, alone = list[float](), list[float]()
    busy = 0.0
    for step, seconds in times.items():
        if step > SKIPPED:
            (beside if busy > 0 else alone).append(seconds)
        busy -= seconds
        if step in written.seconds:
            busy = written.seconds[step][0]
    last = steps if steps in written.seconds else 0
    kept = [pair for step, pair in written.seconds.items() if step != last]
    return beside, alone, [whole for whole, _ in kept], [stall for _, stall in kept]


def p95(values: Sequence[float]) -> float:
    """Return the 95th percentile."""
    return float(np.percentile(values, 95)) if values else float("nan")


def main() -> None:
    """Print a row for each round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--width", type=int, default=256, help="of the encoder's features")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UserError("benchmarks.checkpoints needs two cores")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    shown = [
        [
            "round",
            "beside, ms",
            "otherwise, ms",
            "no checkpoint, ms",
            "ratio",
            "ratio to none",
            "written, s",
            "stall, ms",
        ]
    ]
    figures = list[list[float]]()
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
        folder = Path(name)
        write_scenes(folder / "scenes", 1 + round(1.25 * options.steps * BATCH / CHIPS), seed=1)
        run("shard", "--input", str(folder / "scenes"), "--output", str(folder / "data"), *SHARD)
        os.sched_setaffinity(0, {cores[1]})  # the store inherits it
        with slow_store(folder / "s3", BYTES_PER_S) as environment, mock.patch.dict("os.environ", environment):
            os.sched_setaffinity(0, {cores[0]})
            for number in range(options.rounds):
                several = [
                    train(folder / "data", f"s3://runs/{number}-{every}", options.steps, every, options.width, cores[1])
                    for every in (options.every, 1_000_000)
                ]
                (beside, alone, whole, stall), (_, none, _, _) = several
                found = [p95(beside), p95(alone), p95(none)]
                medians = [statistics.median(whole), statistics.median(stall)]
                figures.append(
                    [*(1e3 * x for x in found), found[0] / found[1], found[0] / found[2], medians[0], 1e3 * medians[1]]
                )
                shown.append([f"{number + 1}: {len(beside)} of {len(beside) + len(alone)} steps", *_shown(figures[-1])])
                print("\n".join(columns(shown)), flush=True)
    shown.append(["median", *_shown([statistics.median(column) for column in zip(*figures, strict=True)])])
    print("\n".join(columns(shown)))


def _shown(row: Sequence[float]) -> list[str]:
    return [f"{value:.{digits}f}" for value, digits in zip(row, (1, 1, 1, 3, 3, 2, 1), strict=True)]


if __name__ == "__main__":
    main()
