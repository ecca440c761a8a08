"""Many runs on S3 in one page: time until it shows all, memory, and what a refresh costs; beside plain TensorBoard.

``python -m benchmarks.monitor [--runs 100] [--steps 2000] [--peer]``: the real writers write one run of one rank,
logged every ten steps; its files are stored once for each run. Then the command `monitor` serves the prefix.
With ``--peer`` plain TensorBoard serves the same prefix after it, with its own reader of S3.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch

from cluster.local.objectstore import ObjectStore
from cluster.local.processes import free_ports
from pipeline.config import RunConfig, TrainConfig
from pipeline.reporting.run_folder import RunFolder
from pipeline.reporting.run_logs import RunLogs
from pipeline.reporting.tags import STEP_TAGS, VAL_TAGS
from pipeline.world import World
from sharding.storage import open_storage

LOG_EVERY, VALIDATE_EVERY = 10, 500
WATCHED_SECONDS = 60.0
PATIENCE = 1800.0


def write_run(uri: str, steps: Sequence[int]) -> None:
    """Write the files of a run of one rank, with made-up values."""
    generator = np.random.default_rng(steps[0])
    run = RunFolder(uri, 1e9)
    with run:
        record = RunConfig().to_dict() | {"environment": {"world_size": 1, "torch": "2", "index_digest": "0" * 64}}
        run.storage.write("config.json", json.dumps(record).encode())
        logs = RunLogs(run, World(0, 1, torch.device("cpu")), TrainConfig(), steps[0])
        for step in steps:
            if step % LOG_EVERY:
                continue
            validation = {}
            if step % VALIDATE_EVERY == 0:
                found = torch.from_numpy(generator.random((1, len(VAL_TAGS))))
                validation = dict(zip(VAL_TAGS, found[0].tolist(), strict=True))
                logs.validation(step, validation, found)
            values = torch.from_numpy(generator.random((len(STEP_TAGS), 1)))
            logs.write_step(step, 0, dict(zip(STEP_TAGS, values, strict=True)), validation)
        logs.close()


def copy_run(source: str, target: str) -> int:
    """Copy a run's files and return their bytes."""
    have, want, size = open_storage(source), open_storage(target), 0
    for item in have.list():
        data = have.read(item.key)
        want.write(item.key, data)
        size += len(data)
    return size


def runs_shown(port: int) -> int:
    """Return the number of runs that a TensorBoard's page has; 0 while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/tags", timeout=60) as answer:
            return sum(bool(tags) for tags in json.load(answer).values())
    except OSError:
        return 0


def used(process: psutil.Process) -> tuple[float, float]:
    """Return CPU seconds and resident MiB of a process and those below it."""
    family = [process, *process.children(recursive=True)]
    times = [one.cpu_times() for one in family]
    return sum(one.user + one.system for one in times), sum(one.memory_info().rss for one in family) / 2**20


def serve(name: str, command: Sequence[str], port: int, runs: int, more: str | None) -> None:
    """Start a page, wait until it shows all runs, and print what it costs; ``more`` is a run that begins later."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        process = psutil.Process(started.pid)
        try:
            first = 0.0
            while (shown := runs_shown(port)) < runs and time.monotonic() - began < PATIENCE:
                if started.poll() is not None:
                    print(f"{name:12} ended with status {started.returncode}", flush=True)
                    return
                first = first or (time.monotonic() - began if shown else 0.0)
                time.sleep(0.5)
            cpu, memory = used(process)
            print(
                f"{name:12} first run after {first:.0f} s, {shown} runs after {time.monotonic() - began:.0f} s:"
                f" {cpu:.1f} CPU s, {memory:.0f} MiB",
                flush=True,
            )
            time.sleep(WATCHED_SECONDS)
            later, memory = used(process)
            print(
                f"{name:12} {WATCHED_SECONDS:.0f} s without news: {later - cpu:.2f} CPU s, {memory:.0f} MiB", flush=True
            )
            if more:
                began = time.monotonic()
                copy_run(f"{more}/run-0", f"{more}/run-later")
                while runs_shown(port) <= shown and time.monotonic() - began < PATIENCE:
                    time.sleep(0.5)
                cpu, memory = used(process)
                print(
                    f"{name:12} a later run after {time.monotonic() - began:.0f} s: {cpu - later:.2f} CPU s", flush=True
                )
        finally:
            for one in process.children(recursive=True):
                one.terminate()
            started.terminate()


def main() -> None:
    """Print a row for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory(prefix="satfusion-monitor-") as folder,
        ObjectStore(Path(folder), bucket="runs") as store,
    ):
        os.environ.update(store.environment)
        place = "s3://runs/all"
        write_run(f"{place}/run-0", range(1, args.steps + 1))
        with ThreadPoolExecutor(8) as pool:
            names = [f"{place}/run-{number}" for number in range(1, args.runs)]
            sizes = list(pool.map(lambda name: copy_run(f"{place}/run-0", name), names))
        size = sum(sizes) * args.runs / max(1, len(sizes)) / 1e6
        print(f"{args.runs} runs of {args.steps} steps, logged every {LOG_EVERY}: {size:.0f} MB", flush=True)
        (port, other) = free_ports(2)
        monitor = [sys.executable, "-m", "cluster.cli", "monitor", place, "--port", str(port)]
        serve("monitor", monitor, port, args.runs, place)
        if args.peer:
            os.environ["S3_ENDPOINT"] = store.environment["AWS_ENDPOINT_URL"]
            peer = [
                sys.executable,
                "-m",
                "tensorboard.main",
                "--logdir",
                place,
                "--port",
                str(other),
                "--load_fast=false",
            ]
            serve("TensorBoard", peer, other, 2 * args.runs, None)


if __name__ == "__main__":
    main()
