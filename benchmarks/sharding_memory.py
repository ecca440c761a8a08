"""Memory of `satfusion shard` over 100 and over 2,000 AOIs, and the time to open an index of 4,000.

``python -m benchmarks.sharding_memory`` plants trees of full-size AOIs, shards them by the real command with one and
with two workers, and prints the peak of resident memory of each process. Then it shards 4,000 AOIs of few pixels and
opens their index, each time in a fresh process. Ten minutes, and 8 GB in the temporary folder; ``--only`` and
``--workers`` run a part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trees import plant
from sharding.format.index import INDEX_NAME

REVISITS = 16
"""Revisits of each AOI: the maximum of the published ones."""
EVERY_S = 0.02
"""Seconds between two polls of the processes. The kernel keeps the peaks, so only growth since the last poll is
missed."""
LARGEST = ("--bands", "all", "--select", "clearest", "--native", "--dtype", "float32")
"""The options with the largest samples: 28 MB each."""
OPEN = """
import sys, time
from sharding.format.index import SPLITS, Index
from sharding.storage import open_storage
storage = open_storage(sys.argv[1])
start = time.perf_counter()
index = Index.load(storage)
print(time.perf_counter() - start, sum(len(index.samples(split)) for split in SPLITS))
"""


@dataclass(frozen=True)
class Peaks:
    """The peak of resident memory of each process of one command, bytes."""

    command: int
    """Peak of the started process: it plans and collects, and with one worker it also builds."""

    workers: tuple[int, ...]
    """Peaks of its worker processes; none with one worker."""

    @property
    def worker(self) -> int:
        """Return the peak of the largest process that builds shards."""
        return max(self.workers, default=self.command)


def watch(folder: Path, output: Path, workers: int, *options: str) -> Peaks:
    """Run `satfusion shard` as a user does, and return its memory.

    Raises:
        RuntimeError: The command fails; the message holds its output.
    """
    command = [sys.executable, "-m", "cluster.cli", "shard", "--input", str(folder), "--output", str(output)]
    peaks: dict[int, int] = {}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--workers", str(workers), *options], stdout=log, stderr=subprocess.STDOUT, text=True
        )
        try:
            while process.poll() is None:
                for pid in (process.pid, *_workers_of(process.pid)):
                    peaks[pid] = max(peaks.get(pid, 0), _peak_of(pid))
                time.sleep(EVERY_S)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            log.seek(0)
            raise RuntimeError(log.read())
    return Peaks(peaks.pop(process.pid), tuple(peaks.values()))


def _workers_of(pid: int) -> list[int]:
    """Return a command's worker processes: those forked by its child process that does nothing else."""
    servers = [child for child in _children_of(pid) if b"forkserver" in _command_of(child)]
    return [worker for server in servers for worker in _children_of(server)]


def _children_of(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def _command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _peak_of(pid: int) -> int:
    """Return the peak of a process's resident memory, bytes; 0 if the process has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def report_memory(sizes: Sequence[int], numbers: Sequence[int], folder: Path) -> None:
    """Print a row for each number of workers and AOIs, and of the largest samples over the fewest AOIs."""
    print("| Options | Workers | AOIs | the command, MiB | largest worker, MiB | of the fewest AOIs' | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for aois in sizes:
        plant(folder / f"{aois}", aois, revisits=REVISITS)
    kinds = (("default", (), sizes), ("largest samples", LARGEST, sizes[:1]))
    for workers, (name, options, counts) in itertools.product(numbers, kinds):
        least = 0
        for aois in counts:
            start = time.monotonic()
            peaks = watch(folder / f"{aois}", folder / "out", workers, *options)
            seconds = time.monotonic() - start
            shutil.rmtree(folder / "out")
            least = least or peaks.worker
            print(
                f"| {name} | {workers} | {aois} | {peaks.command / 2**20:.0f} | {peaks.worker / 2**20:.0f} | "
                f"{peaks.worker / least:.3f}x | {seconds:.0f} |",
                flush=True,
            )


def report_index(aois: int, repeats: int, folder: Path) -> None:
    """Print the time to open the index of so many AOIs."""
    plant(folder / "small", aois, revisits=2, hr_side=80)
    # About as many samples per shard as with full-size ones.
    options = ("--revisits", "2", "--lr-size", "16", "--hr-size", "50", "--shard-size", "0.5")
    watch(folder / "small", folder / "index", 2, *options)
    size = (folder / "index" / INDEX_NAME).stat().st_size
    opened = [_open_index(folder / "index") for _ in range(repeats)]
    seconds = [took for took, _ in opened]
    print(
        f"index of {opened[0][1]} AOIs, {size / 1e6:.2f} MB: opens in {1e3 * statistics.median(seconds):.0f} ms "
        f"(median of {repeats} fresh processes, {1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f})"
    )


def _open_index(folder: Path) -> tuple[float, int]:
    """Open a dataset's index in a fresh process; return the seconds, imports apart, and its samples."""
    ended = subprocess.run([sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True)
    seconds, samples = ended.stdout.split()
    return float(seconds), int(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["memory", "index"], help="leave the other out")
    parser.add_argument("--aois", type=int, nargs="+", default=[100, 2000], help="of the trees (default: 100 2000)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of each tree (default: 1 2)")
    parser.add_argument("--indexed", type=int, default=4000, help="AOIs of the index (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="openings of the index (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "index":
            report_memory(sorted(options.aois), options.workers, Path(folder))
        if options.only != "memory":
            report_index(options.indexed, options.repeats, Path(folder))


if __name__ == "__main__":
    main()
