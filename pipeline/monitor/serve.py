"""The verb `monitor`: TensorBoard on a board of runs that is kept up to date, or one look at them."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pipeline.monitor.board import Board, RunOnBoard
from pipeline.monitor.discover import Discovery
from pipeline.monitor.pages import FINAL, FIRST
from pipeline.monitor.seeds import Seeds
from pipeline.signals import dies_with_parent
from sharding.errors import UserError
from sharding.scratch import scratch_folder
from sharding.storage.retries import GIVE_UP
from sharding.terminal import say

logger = logging.getLogger(__name__)

_THREADS = 8
"""Runs that are read at the same time."""
_LONGEST_REST = 12
"""Longest pause of a run in which nothing happens, in rounds of updates."""


class Watch:
    """The runs below some places, shown on a board."""

    def __init__(self, uris: Sequence[str], root: Path) -> None:
        """Prepare a board below ``root``; `update` fills it.

        Raises:
            UserError: A URI that no store can have.
        """
        self.runs: dict[str, RunOnBoard] = {}
        self._discovery = Discovery(uris)
        self._board = Board(root)
        self._seeds = Seeds(self._board)
        self._round = 0
        self._rests: dict[str, int] = {}
        self._due: dict[str, int] = {}

    @property
    def places(self) -> str:
        """Return the URIs, for messages."""
        return self._discovery.places

    def look(self, pool: Executor) -> None:
        """Find runs that began since the last look.

        Raises:
            UserError: A store does not answer or refuses.
        """
        for found in self._discovery.look(pool):
            self.runs[found.name] = RunOnBoard(found, self._board)

    def update(self, pool: Executor) -> None:
        """Show what is new in all runs; one that cannot be read is named in the log and tried again.

        Raises:
            OSError: The board cannot be written.
        """
        self._round += 1
        due = [run for name, run in self.runs.items() if self._due.get(name, 0) <= self._round]
        for run, is_new in zip(due, pool.map(_update, due), strict=True):
            # A run that ended, or a killed one, is asked less and less often.
            rest = 1 if is_new else min(2 * self._rests.get(run.name, 1), _LONGEST_REST)
            self._rests[run.name], self._due[run.name] = rest, self._round + rest
        self._seeds.update(self.runs.values())

    def table(self) -> str:
        """Return a line for each run: name, model, last step and final figures."""
        head: tuple[str, ...] = ("run", "model", "step", *FINAL)
        rows = [head]
        for name, run in sorted(self.runs.items()):
            figures = (run.curves.last(tag) for tag in FINAL)
            shown = ("-" if value is None or math.isnan(value) else f"{value:.4g}" for value in figures)
            rows.append((name, run.facts.model if run.facts else "-", str(run.curves.last_step), *shown))
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def _update(run: RunOnBoard) -> bool:
    try:
        return run.update() > 0
    except (UserError, OSError) as error:
        logger.warning("run %s is not refreshed, will retry: %s", run.name, error)
        return False


@contextmanager
def watching(uris: Sequence[str], refresh_seconds: float) -> Iterator[Path]:
    """Yield the folder of a board that a thread keeps up to date.

    Args:
        uris: Runs, places above runs, or places where neither is yet.
        refresh_seconds: Seconds between updates.

    Raises:
        UserError: A store refuses or does not answer at the first look.
    """
    with scratch_folder("monitor") as root, _waited_for(), ThreadPoolExecutor(_THREADS) as pool:
        watch = Watch(uris, root)
        watch.look(pool)
        if not watch.runs:
            logger.warning("no run is in %s yet: waiting for one", watch.places)
        stop = threading.Event()
        follower = threading.Thread(target=_follow, args=(watch, pool, refresh_seconds, stop), daemon=True)
        follower.start()
        try:
            yield root
        finally:
            stop.set()
            GIVE_UP.set()
            follower.join()


@contextmanager
def _waited_for() -> Iterator[None]:
    """Let threads wait for stores again after the block, in which `GIVE_UP` was set to end them."""
    try:
        yield
    finally:
        GIVE_UP.clear()


def _follow(watch: Watch, pool: Executor, refresh_seconds: float, stop: threading.Event) -> None:
    while not stop.is_set():
        for work in (watch.update, watch.look):
            try:
                work(pool)
            except Exception as error:  # whatever it is, the next round may succeed, and the board must not freeze
                logger.warning("not refreshed, will retry: %s", error)
            if work == watch.update and stop.wait(refresh_seconds):
                return


def list_once(uris: Sequence[str]) -> int:
    """Print the table of the runs as they are now, and return the exit status.

    Raises:
        UserError: A store does not answer, or no run is there.
    """
    with scratch_folder("monitor") as root, ThreadPoolExecutor(_THREADS) as pool:
        watch = Watch(uris, root)
        watch.look(pool)
        if not watch.runs:
            raise UserError(f"no run is in {watch.places}: name a run folder, or a folder or prefix above runs")
        watch.update(pool)
        for line in watch.table().splitlines():
            say(line)
    return 0


def monitor(uris: Sequence[str], host: str, port: int, refresh_seconds: float) -> int:
    """Serve TensorBoard on the runs in ``uris`` until interrupted; return its exit status."""
    program = shutil.which("tensorboard", path=str(Path(sys.executable).parent)) or "tensorboard"
    with watching(uris, refresh_seconds) as folder:
        command = [program, "--logdir", str(folder), "--host", host, "--port", str(port)]
        # New events appear within seconds.
        command += ["--reload_interval", "5", "--reload_multifile", "true"]
        if port:
            print(f"first page: {first_page(host, port)}", flush=True)
        # A session of its own, so that Ctrl-C reaches it only through this process.
        # It ends with this process, however that ends; what it writes for itself goes where we remove it.
        server = subprocess.Popen(  # noqa: S603 - our own words, no shell
            command,
            start_new_session=True,
            preexec_fn=dies_with_parent(),
            env={**os.environ, "TMPDIR": str(folder)},
        )
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()
            server.wait()


def first_page(host: str, port: int) -> str:
    """Return the address of a page that opens with the curves that matter most."""
    pinned = json.dumps([{"plugin": "scalars", "tag": tag} for tag in FIRST], separators=(",", ":"))
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/?pinnedCards={urllib.parse.quote(pinned)}#timeseries"
