"""A sweep on two real Ray nodes, one of them killed while it trains."""

from __future__ import annotations

import contextlib
import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.drill_faults import cluster_of
from cluster.local.nodes import LocalCluster
from cluster.local.processes import running_with
from cluster.sweep.cell import RESULT_FILE
from cluster.sweep.run import TABLE
from pipeline.config import RunConfig
from tests.in_process import run_here

PATIENCE = 3600.0


def node_of(cluster: LocalCluster, address: str) -> psutil.Process:
    """Return the raylet of a node."""
    for one in running_with("SATFUSION_CLUSTER", cluster.mark):
        process = psutil.Process(one.pid)
        words = process.cmdline()
        if words and words[0].endswith("raylet/raylet") and f"--node_ip_address={address}" in words:
            return process
    raise AssertionError(f"no raylet on {address}")


def training_below(raylet: psutil.Process, sweep: Path) -> str | None:
    """Return the run that a node has begun to train, ``PAIR/seed-N``: a worker of it has its events open."""
    for worker in raylet.children(recursive=True):
        try:
            opened = [Path(file.path) for file in worker.open_files()]
        except psutil.Error:
            continue
        for path in opened:
            if path.is_relative_to(sweep) and "events" in path.parts:
                return str(Path(*path.relative_to(sweep).parts[:2]))
    return None


def until(happened: Callable[[], str | None], sweep: subprocess.Popen[str]) -> str:
    """Wait for something while the sweep runs, and return it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and sweep.poll() is None:
        if found := happened():
            return found
        time.sleep(0.02)
    raise AssertionError(f"it did not happen; the sweep: {sweep.poll()}")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("encoders", "heads", "seeds"),
    [("srcnn,highresnet", "pnn", 2)],
    ids=["2x1x2"],
)
def test_a_lost_node_loses_no_run_and_what_is_done_is_kept(
    make_config: Callable[..., RunConfig], tmp_path: Path, encoders: str, heads: str, seeds: int
) -> None:
    place = tmp_path / "sweep"
    config = tmp_path / "tiny.toml"
    made = make_config(place, "train.max_steps=60", "train.checkpoint_every=10", "train.epochs=1000", "output.panels=0")
    config.write_text(made.to_toml())
    pairs = len(encoders.split(",")) * len(heads.split(","))
    log = tmp_path / "sweep.log"
    with tempfile.TemporaryDirectory(prefix="sf-") as state, cluster_of(2, Path(state) / "c") as cluster:
        words = [
            *("sweep", str(config), "--encoders", encoders, "--heads", heads),
            *("--seeds", str(seeds), "--address", cluster.address),
        ]

        with log.open("w") as output:
            running = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", *words], stdout=output, stderr=subprocess.STDOUT, text=True
            )
        raylet = node_of(cluster, cluster.nodes[1])
        until(lambda: next((str(path) for path in place.rglob(RESULT_FILE)), None), running)
        lost = until(lambda: training_below(raylet, place), running)
        done = {path: path.stat().st_mtime_ns for path in place.rglob(RESULT_FILE)}
        for process in (raylet, *raylet.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert running.wait(PATIENCE) == 0, log.read_text()
        assert place / lost / RESULT_FILE not in done
        assert len(list((place / lost / "events/rank-0").iterdir())) >= 2, "it was restarted"
        assert {path: path.stat().st_mtime_ns for path in done} == done
        with (place / TABLE).open() as file:
            rows = [row for row in csv.DictReader(file) if row["head"]]
        assert [(row["runs"], row["done"]) for row in rows] == [(str(seeds), str(seeds))] * pairs
        assert all(float(row["psnr_spread"]) > 0 for row in rows)
        # The same command again does nothing.
        files = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
        again = run_here(*words)
        assert again.returncode == 0, again.stdout + again.stderr
        assert f"{pairs * seeds} runs, {pairs * seeds} of them done" in again.stdout
        assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == files
