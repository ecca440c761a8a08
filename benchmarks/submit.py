"""Ray with DeepSpeed beside torchrun with DDP, and a job's start: ``python -m benchmarks.submit [--rounds 3]``.

Two ranks of one CPU each train the same configuration in turn: `submit` to a warm local cluster of two nodes, and
``torchrun`` with the plain engine. Printed are the median step of each, and how long a job takes from `submit` to its
first step.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.batch import SHARD, write_scenes
from benchmarks.batch import run as satfusion
from benchmarks.results import columns
from cluster.local import nodes as local
from cluster.local.nodes import NodeOptions
from sharding.errors import UserError

PROGRAM = (sys.executable, "-m", "cluster.cli")
"""The command line of this environment."""
MARKS = {
    "sent": "sent to",
    "driver begins": "Running entrypoint",
    "ranks placed": "runs on node",
    "first step": "2 ranks, ",
}
"""Words of the log that end each part of a job's start, in order. The last line comes just before the first step."""
BATCH = 8
"""Chips of a step."""


def words(data: Path, folder: Path, engine: str, steps: int) -> list[str]:
    """Return a training's configuration as words of the command line."""
    return [
        *("srcnn_pnn", f"data.uri={data}", f"output.uri={folder}", "output.panels=0", "model.revisits=2"),
        *("model.hidden=64", f"train.engine={engine}", "train.threads_per_rank=1", f"train.global_batch={BATCH}"),
        *(f"train.max_steps={steps}", "train.epochs=1000", "train.checkpoint_every=1000000"),
    ]


def train(command: Sequence[str], folder: Path) -> tuple[float, list[float]]:
    """Run a command that trains; return the median step, and the time from the start to each of `MARKS`, seconds."""
    began, marks = time.monotonic(), dict[str, float]()
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        said = list[str]()
        for line in process.stdout:
            said.append(line)
            for name, words in MARKS.items():
                if words in line:
                    marks.setdefault(name, time.monotonic() - began)
    if process.returncode:
        raise UserError(f"{folder.name} failed: {''.join(said)[-3000:]}")
    with (folder / "metrics.csv").open(newline="") as file:
        rates = [float(row["time/chips_per_second"]) for row in csv.DictReader(file)]
    return statistics.median(BATCH / rate for rate in rates[len(rates) // 4 :]), [
        marks.get(name, 0.0) for name in MARKS
    ]


def main() -> None:
    """Print a row for each round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    rows = [["round", "Ray + DeepSpeed, ms", "torchrun + DDP, ms", "ratio", *(f"{name}, s" for name in MARKS)]]
    figures = list[list[float]]()
    # Short enough for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="sf-") as name:
        folder = Path(name)
        write_scenes(folder / "scenes", 40, seed=1)
        satfusion("shard", "--input", str(folder / "scenes"), "--output", str(folder / "data"), *SHARD)
        try:
            cluster = local.up(NodeOptions(nodes=2, cpus_per_node=1, object_store_mb=80), folder / "c")
            submit = [*PROGRAM, "submit", "--address", cluster.address, "--workers", "2"]
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *PROGRAM[1:], "train"]
            for number in range(options.rounds):
                ours, theirs = (folder / f"{engine}-{number}" for engine in ("deepspeed", "torch"))
                step, marks = train([*submit, *words(folder / "data", ours, "deepspeed", options.steps)], ours)
                peer, _ = train([*torchrun, *words(folder / "data", theirs, "torch", options.steps)], theirs)
                figures.append([1e3 * step, 1e3 * peer, step / peer, *marks])
                rows.append([str(number + 1), *_shown(figures[-1])])
                print("\n".join(columns(rows)), flush=True)
        finally:
            local.down(folder / "c")
    rows.append(["median", *_shown([statistics.median(column) for column in zip(*figures, strict=True)])])
    print("\n".join(columns(rows)))


def _shown(row: Sequence[float]) -> list[str]:
    return [f"{row[0]:.1f}", f"{row[1]:.1f}", f"{row[2]:.3f}", *(f"{value:.1f}" for value in row[3:])]


if __name__ == "__main__":
    main()
