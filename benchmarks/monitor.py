"""Many runs on S3 in one page: time until it shows all, memory, and what a refresh costs; beside plain TensorBoard.

``python -m benchmarks.monitor [--runs 500] [--steps 10000] [--peer]``: the real writers write one run of one rank,
logged every ten steps; its files are stored once for each run, each with its own learning rate and seed, two seeds a
rate. Then the command `monitor` serves the prefix. With ``--peer`` plain TensorBoard serves a mirror on the disk after
it, which spares it the reading of S3.
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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch

from cluster.local.objectstore import ObjectStore
from cluster.local.processes import free_ports
from pipeline.config import RunConfig, TrainConfig
from pipeline.reporting.run_folder import CONFIG_FILE, RunFolder
from pipeline.reporting.run_logs import RunLogs
from pipeline.reporting.tags import STEP_TAGS, VAL_TAGS
from pipeline.world import World
from sharding.storage import open_storage

LOG_EVERY, VALIDATE_EVERY = 10, 500
WATCHED_SECONDS = 30.0
PATIENCE = 1800.0


def write_run(uri: str, steps: Sequence[int]) -> None:
    """Write the files of a run of one rank, with made-up values."""
    generator = np.random.default_rng(steps[0])
    run = RunFolder(uri, 1e9)
    with run:
        record = RunConfig().to_dict() | {"environment": {"world_size": 1, "torch": "2", "index_digest": "0" * 64}}
        run.storage.write(CONFIG_FILE, json.dumps(record).encode())
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


def files_of(uri: str) -> dict[str, bytes]:
    """Return a run's files by key."""
    run = open_storage(uri)
    return {item.key: run.read(item.key) for item in run.list()}


def store_run(files: Mapping[str, bytes], uri: str, number: int) -> int:
    """Store a run's files with the settings of run ``number`` and return their bytes."""
    run = open_storage(uri)
    record = json.loads(files[CONFIG_FILE])
    record["train"] |= {"seed": number % 2, "learning_rate": 1e-4 * (1 + number // 2)}
    files = {**files, CONFIG_FILE: json.dumps(record).encode()}
    for key, data in files.items():
        run.write(key, data)
    return sum(map(len, files.values()))


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


def page_is_up(port: int) -> bool:
    """Return True if the first page is served."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
            return bool(answer.read(1))
    except OSError:
        return False


def until(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> float:
    """Wait until something happened and return the seconds."""
    began = time.monotonic()
    while not happened():
        if process.poll() is not None or time.monotonic() - began > PATIENCE:
            raise SystemExit(f"it did not happen within {time.monotonic() - began:.0f} s")
        time.sleep(0.2)
    return time.monotonic() - began


def serve(name: str, command: Sequence[str], port: int, runs: int, add: Callable[[], object] | None) -> None:
    """Start a page, wait until it shows all ``runs``, and print what it costs; ``add`` makes one more run."""

    def say(what: str) -> None:
        print(f"{name:12} {what} (load {os.getloadavg()[0]:.0f})", flush=True)

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        process = psutil.Process(started.pid)
        try:
            up = until(lambda: page_is_up(port), started)
            first = up + until(lambda: runs_shown(port) > 0, started)
            say(f"page after {up:.1f} s, first run after {first:.1f} s")
            whole = first + until(lambda: runs_shown(port) >= runs, started)
            cpu, memory = used(process)
            say(f"{runs} runs after {whole:.0f} s: {cpu:.1f} CPU s, {memory:.0f} MiB")
            time.sleep(WATCHED_SECONDS)
            later, memory = used(process)
            say(f"{WATCHED_SECONDS:.0f} s without news: {later - cpu:.2f} CPU s, {memory:.0f} MiB")
            if add:
                add()
                seconds = until(lambda: runs_shown(port) > runs, started)
                cpu, memory = used(process)
                say(f"a later run after {seconds:.0f} s: {cpu - later:.2f} CPU s, {memory:.0f} MiB")
        finally:
            family = process.children(recursive=True)
            for one in (*family, process):
                one.terminate()
            psutil.wait_procs(family, 60)


def main() -> None:
    """Print a row for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory(prefix="satfusion-monitor-") as folder,
        ObjectStore(Path(folder) / "s3", bucket="runs") as store,
    ):
        os.environ.update(store.environment)
        write_run(f"{folder}/one", range(1, args.steps + 1))
        files = files_of(f"{folder}/one")
        port, other = free_ports(2)

        def store_all(place: str) -> int:
            with ThreadPoolExecutor(8) as pool:
                numbers = range(args.runs)
                return sum(pool.map(lambda number: store_run(files, f"{place}/run-{number:03}", number), numbers))

        place, mirror = "s3://runs/all", f"{folder}/mirror"
        size = store_all(place)
        print(f"{args.runs} runs of {args.steps} steps, logged every {LOG_EVERY}: {size / 1e6:.0f} MB", flush=True)
        command = [sys.executable, "-m", "cluster.cli", "monitor", place, "--port", str(port)]
        # Pairs of seeds have three curves of their own; the layout is one more run of TensorBoard without scalars.
        shown = args.runs + 3 * (args.runs // 2)
        serve("monitor", command, port, shown, lambda: store_run(files, f"{place}/run-later", 10**6))
        if args.peer:
            store_all(mirror)
            command = [sys.executable, "-m", "tensorboard.main", "--logdir", mirror, "--port", str(other)]
            # It shows the events of the rank and those of all ranks as runs of their own.
            serve("TensorBoard", command, other, 2 * args.runs, None)


if __name__ == "__main__":
    main()
