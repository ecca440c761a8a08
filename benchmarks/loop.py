"""The real training loop, loader included, for `benchmarks.step`."""

from __future__ import annotations

import csv
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import load_config
from pipeline.training.loop import run_training
from sharding.format.index import Index
from sharding.storage import open_storage


def loop_figures(
    model: str, engine: str, flags: Sequence[str], precision: str, batch: int, uri: str, steps: int, width: int
) -> tuple[float, float]:
    """Train ``steps`` steps from ``uri``; return chips a second and the share of waiting for data.

    Both are over the second half of the steps, by the run's own metrics.csv.
    """
    encoder, _, head = model.partition("+")
    keys = [f"train.{flag}=true" for flag in flags if not flag.startswith("zero")]
    keys += [f"train.zero_stage={flag.removeprefix('zero')}" for flag in flags if flag.startswith("zero")]
    with tempfile.TemporaryDirectory(prefix="satfusion-step-") as folder:
        overrides = [
            f"model.encoder={encoder}",
            f"model.head={head}",
            f"model.hidden={width}",
            f"model.revisits={Index.load(open_storage(uri)).preparation.revisits}",
            f"data.uri={uri}",
            f"output.uri={folder}",
            f"train.engine={engine}",
            f"train.precision={precision}",
            f"train.global_batch={batch}",
            f"train.max_steps={steps}",
            "train.checkpoint_every=1000000",
            "output.panels=0",
        ]
        run_training(load_config("srcnn_pnn", [*overrides, *keys]))
        with Path(folder, "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    rows = rows[len(rows) // 2 :]
    rates = [float(row["time/chips_per_second"]) for row in rows]
    waits = [float(row["time/data_wait_seconds"]) for row in rows]
    return statistics.median(rates), sum(waits) / sum(batch / rate for rate in rates)
