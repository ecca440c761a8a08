"""A training under failures drawn by chance: ``python -m benchmarks.storm [--failures 20] [--seed 0]``.

Two ranks train on three nodes of this machine. Every `PAUSE_S` seconds one failure comes: a rank or Ray Train's
controller is killed, and once a node. The dataset is on a slow store, which paces the steps, so that the training
outlasts the failures and leaves the cores time to restart. The undisturbed training runs at the same time, on a cluster
of its own. Printed are the failures, the effective training time, and whether weights and order of chips are the
undisturbed run's.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from benchmarks.drill_faults import Training, cluster_of
from benchmarks.drills import FAULTS, INTERVAL, Fault, compared, configured, shard_scenes, undisturbed
from benchmarks.slow_store import slow_store
from pipeline.config import RunConfig
from sharding.errors import UserError
from sharding.storage import open_storage

PAUSE_S = 180.0
"""Seconds between two failures."""
STEPS = 40
"""Steps of the training for each failure."""
BYTES_PER_S = 0.3e6
"""Rate of each read from the store: a step takes about three seconds."""
PATIENCE = 900.0
"""Seconds that the training may take after the last failure, and for each step besides."""


def drawn(failures: int, seed: int) -> list[str]:
    """Return the names of the failures in order: one is the loss of a node, which leaves as many as there are ranks."""
    chance = random.Random(seed)  # noqa: S311 - draws failures, no secrets
    names = ["node", *chance.choices(["rank", "controller"], k=failures - 1)]
    chance.shuffle(names)
    return names


def storm(config: RunConfig, names: list[str], state: Path) -> Training:
    """Train through failures; a failure whose process is just being restarted comes when it runs."""
    with cluster_of(3, state) as cluster:
        training = Training(cluster, config, 2, 2 * len(names))
        training.submit()
        training.until(lambda: training.step() > 0)
        began = time.monotonic()
        for number, name in enumerate(names, 1):
            training.wait(began + number * PAUSE_S - time.monotonic())
            while not training.ended and not _strikes(FAULTS[name], training):
                training.wait(0.5)
            if training.ended:
                break
            since = time.monotonic() - began
            print(f"{since:6.1f} s, step {training.step()}: {FAULTS[name].about}", flush=True)
        training.wait(PATIENCE + 3 * config.train.max_steps)
    return training


def _strikes(fault: Fault, training: Training) -> bool:
    """Cause a fault; return False if there is nothing to kill at this moment."""
    try:
        fault.strike(training)
    except UserError:
        return False
    return True


def main() -> int:
    """Do it; exit status 1 if the training did not end like the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failures", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.failures < 1:
        parser.error(f"--failures {given.failures} is not a number from 1")
    # Short enough for Ray's sockets.
    with (
        tempfile.TemporaryDirectory(prefix="sf-") as name,
        slow_store(Path(name) / "s3", BYTES_PER_S) as environment,
        mock.patch.dict(os.environ, environment),
        ThreadPoolExecutor(1) as beside,
    ):
        folder, data = Path(name), "s3://runs/data"
        shard_scenes(folder, open_storage(data))
        words = (f"train.max_steps={STEPS * given.failures}", "data.cache_mib=0", "data.loader_threads=1")
        calm, rough = (configured(data, folder / run, *words) for run in ("undisturbed", "storm"))
        waiting = beside.submit(undisturbed, calm, folder / "u")
        training = storm(rough, drawn(given.failures, given.seed), folder / "c")
        reference = waiting.result()
        for run in (reference, training):
            lines = [line for line in run.log.getvalue().splitlines() if "effective training time" in line]
            print(f"{run.run.name}: {lines[-1] if lines else 'no figure'}")
        restarts = [line for line in training.log.getvalue().splitlines() if "resuming after step" in line]
        print(f"{len(restarts)} starts from a checkpoint, one every {INTERVAL} steps")
        outcome = compared(training, reference)
        print(f"equal: {outcome}")
    return int(outcome.startswith("NO"))


if __name__ == "__main__":
    sys.exit(main())
