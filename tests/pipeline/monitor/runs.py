"""Runs made of the real writers and values that a test names, and the real command that shows them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from cluster.local.processes import free_ports
from pipeline.config import RunConfig, TrainConfig
from pipeline.reporting.run_folder import CONFIG_FILE, RunFolder
from pipeline.reporting.run_logs import RunLogs
from pipeline.reporting.tags import STEP_TAGS, VAL_TAGS
from pipeline.world import World


def write_run(
    uri: str,
    steps: Sequence[int],
    loss: Mapping[int, Sequence[float]] | None = None,
    *,
    config: RunConfig | None = None,
    ranks: int = 1,
    retries: int = 0,
    psnr: float = 20.0,
    panel: bool = False,
) -> None:
    """Write a run's steps with the given losses of the ranks (default 1 / step), the last one validated.

    The time to wait for data is the rank's number; the retries are counted at the last step.
    """
    config = config or RunConfig()
    world = [World(rank, ranks, torch.device("cpu")) for rank in range(ranks)]
    run = RunFolder(uri, 1e9)
    with run:
        record = config.to_dict() | {"environment": {"world_size": ranks, "torch": "2.13.0", "index_digest": "d" * 64}}
        run.storage.write(CONFIG_FILE, json.dumps(record).encode())
        for place in world:
            logs = RunLogs(run, place, TrainConfig(), steps[0])
            for step in steps:
                by_rank = {tag: torch.zeros(ranks, dtype=torch.float64) for tag in STEP_TAGS}
                values = (loss or {}).get(step, [1 / step] * ranks)
                by_rank["train/loss"] = torch.tensor(list(values), dtype=torch.float64)
                by_rank["time/data_wait_seconds"] = torch.arange(ranks, dtype=torch.float64)
                by_rank["time/chips_per_second"] = torch.full((ranks,), 8.0, dtype=torch.float64)
                if step == steps[-1]:
                    by_rank["data/retries"] = torch.full((ranks,), float(retries), dtype=torch.float64)
                validation = dict.fromkeys(VAL_TAGS, psnr) if step == steps[-1] else {}
                if validation:
                    logs.validation(step, validation, torch.full((ranks, len(VAL_TAGS)), psnr, dtype=torch.float64))
                logs.write_step(step, 0, by_rank, validation)
            if panel:
                logs.panel(steps[-1], "val/0", np.zeros((8, 8, 3), np.uint8))
            logs.close()


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """Return a configuration with another seed."""
    return replace(config, train=replace(config.train, seed=seed))


@contextmanager
def monitoring(*uris: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Yield the address of the real command's TensorBoard on the runs in ``uris``, and the command's process."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "cluster.cli", "monitor", *uris, "--port", str(port), "--refresh", "0.5"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0


def ask(url: str, until: Callable[[object], bool], patience: float = 400, body: bytes | None = None) -> object:
    """Ask until the expected answer arrives; return it."""
    deadline = time.monotonic() + patience
    answer: object = None
    while time.monotonic() < deadline:
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=5) as response:
                answer = json.load(response)
            if until(answer):
                return answer
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.3)
    raise AssertionError(f"{url} did not come to it: {answer}")
