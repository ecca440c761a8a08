"""Runs of a sweep on this machine, each in a process of its own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from cluster.sweep.run import Outcome
from pipeline.config import RunConfig
from pipeline.signals import dies_with_parent
from sharding.scratch import scratch_folder

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


def cells_here(parallel: int, split: str) -> Callable[[Sequence[RunConfig]], Iterator[Outcome]]:
    """Return a runner that trains up to ``parallel`` runs at once.

    A process for each, because DeepSpeed forms one process group in its life; a crash ends one run.
    """

    def run(cells: Sequence[RunConfig]) -> Iterator[Outcome]:
        waiting = list(reversed(cells))
        running: dict[subprocess.Popen[bytes], RunConfig] = {}
        with scratch_folder("sweep") as folder:
            try:
                while waiting or running:
                    while waiting and len(running) < parallel:
                        cell = waiting.pop()
                        file = folder / f"cell-{len(waiting)}.json"
                        file.write_text(json.dumps({"config": cell.to_dict(), "split": split}))
                        command = [sys.executable, "-m", "cluster.sweep.cell", str(file)]
                        # A session of its own, so that Ctrl-C reaches it only through this process.
                        process = subprocess.Popen(  # noqa: S603 - our own words, no shell
                            command, start_new_session=True, preexec_fn=dies_with_parent()
                        )
                        running[process] = cell
                    ended = [process for process in running if process.poll() is not None]
                    for process in ended:
                        status = process.returncode
                        yield Outcome(
                            running.pop(process), f"it ended with status {status}, see its log" if status else ""
                        )
                    if not ended:
                        time.sleep(_POLL_SECONDS)
            finally:
                if running:
                    logger.info("%d runs stop at a checkpoint; Ctrl-C again ends them at once", len(running))
                for process in running:
                    process.terminate()
                for process in running:
                    process.wait()

    return run
