"""Uploads of a long training's events, metrics and panels: bytes, objects, delay and memory.

``python -m benchmarks.events [--steps 100000] [--step-seconds 0.15] [--validate-every 1000]``: the real writers of
rank 0, with made-up values and a clock that jumps, upload to a real S3 server. The row "before" has the same bytes,
each changed file sent whole at each upload, as computed from the files' sizes.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
import torch

from cluster.local.objectstore import ObjectStore
from pipeline.config import OutputConfig, TrainConfig
from pipeline.reporting import segments
from pipeline.reporting.events import AGGREGATE
from pipeline.reporting.panels import num_panels
from pipeline.reporting.run_folder import RunFolder
from pipeline.reporting.run_logs import RunLogs
from pipeline.reporting.tags import STEP_TAGS, VAL_TAGS
from pipeline.world import World
from sharding.storage import Storage

RANKS = 2
CHECKPOINT_EVERY = TrainConfig().checkpoint_every
PANEL = (176, 780, 3)


@dataclass
class Uploads:
    """Counts of what a storage is given."""

    sent: Counter[str] = field(default_factory=Counter)
    """Bytes by the first folder of the key."""
    requests: int = 0
    events: int = 0
    """Uploads of events of all ranks."""

    def watch(self, storage: Storage) -> None:
        """Count the writes of a storage and of those below it."""
        write, child = storage.write, storage.child

        def counted_write(key: str, data: bytes) -> None:
            write(key, data)
            place = f"{getattr(storage, '_prefix', '')}/{key}"
            self.sent["events" if "/events/" in place else "csv" if ".csv" in place else "images"] += len(data)
            self.requests += 1
            self.events += AGGREGATE in key

        def counted_child(name: str) -> Storage:
            below = child(name)
            self.watch(below)
            return below

        storage.write, storage.child = counted_write, counted_child  # type: ignore[method-assign]


@dataclass
class Imitated:
    """Result of an imitated run."""

    written: int
    before: int
    uploads: Uploads
    delay: float
    """Longest time from an event to its upload, seconds."""
    resident: list[int]
    """Resident memory after each tenth of the steps, bytes."""


def imitate(uri: str, steps: int, step_seconds: float, epoch: int, output: OutputConfig) -> Imitated:
    """Write and upload a run's files with a clock that jumps by ``step_seconds``; epochs have ``epoch`` steps."""
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now, time=lambda: 1.7e9 + now)
    generator = np.random.default_rng(1)
    uploads, sizes, before = Uploads(), dict[str, int](), 0
    delay, unsent, last_sync, resident = 0.0, now, now, list[int]()
    world = World(0, RANKS, torch.device("cpu"))
    run = RunFolder(uri, 1e9)
    uploads.watch(run.storage)

    def sync(everything: bool) -> None:
        nonlocal before, delay, last_sync, unsent
        had = uploads.events
        run.sync(everything=everything)
        last_sync = now
        if uploads.events > had:
            delay, unsent = max(delay, now - unsent), now
        before += changed(run.local, sizes)

    with mock.patch.object(segments, "time", clock), run:
        logs = RunLogs(run, world, TrainConfig(), 1)
        for step in range(1, steps + 1):
            now += step_seconds
            values = torch.from_numpy(generator.random((len(STEP_TAGS), RANKS)))
            validation = {}
            if step % epoch == 0:
                by_rank = torch.from_numpy(generator.random((RANKS, len(VAL_TAGS))))
                validation = dict(zip(VAL_TAGS, by_rank.mean(0).tolist(), strict=True))
                for chip in range(num_panels(output, step, epoch, steps)):
                    picture = generator.normal(128, 12, PANEL).clip(0, 255).astype(np.uint8)
                    logs.panel(step, f"val/{chip}", picture)
                logs.validation(step, validation, by_rank)
            logs.write_step(step, step // epoch, dict(zip(STEP_TAGS, values, strict=True)), validation)
            if step % CHECKPOINT_EVERY == 0:
                sync(everything=True)
            elif now - last_sync >= output.sync_seconds:
                sync(everything=False)
            if step % max(1, steps // 10) == 0:
                resident.append(psutil.Process().memory_info().rss)
        logs.close()
        run.sync(final=True)
        before += changed(run.local, sizes)
        return Imitated(whole(run.local), before, uploads, delay, resident)


def changed(folder: Path, sizes: dict[str, int]) -> int:
    """Return the bytes of whole files that have changed, the segments of a process taken as one file."""
    now: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.parent) if "tfevents" in path.name else str(path)
            now[name] += path.stat().st_size
    sent = sum(size for name, size in now.items() if sizes.get(name) != size)
    sizes.update(now)
    return sent


def whole(folder: Path) -> int:
    """Return the bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Print both rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--step-seconds", type=float, default=0.15)
    parser.add_argument("--sync-seconds", type=float, default=OutputConfig().sync_seconds)
    parser.add_argument("--validate-every", type=int, default=1000)
    parser.add_argument("--panels-every", type=int, default=OutputConfig().panels_every)
    args = parser.parse_args()
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    output = OutputConfig(sync_seconds=args.sync_seconds, panels_every=args.panels_every)
    with (
        tempfile.TemporaryDirectory(prefix="satfusion-events-") as folder,
        ObjectStore(Path(folder), bucket="runs") as store,
        mock.patch.dict("os.environ", store.environment),
    ):
        began = time.monotonic()
        done = imitate("s3://runs/run", args.steps, args.step_seconds, args.validate_every, output)
        objects = Counter(item.key.rsplit("/", 1)[0] for item in RunFolder("s3://runs/run", 1).storage.list())
    sent = sum(done.uploads.sent.values())
    print(f"{args.steps} steps of {args.step_seconds} s, imitated in {time.monotonic() - began:.0f} s")
    print(f"written        {done.written / 1e6:10.1f} MB")
    print(f"before         {done.before / 1e6:10.1f} MB uploaded, {done.before / done.written:.2f} x")
    parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sorted(done.uploads.sent.items()))
    print(
        f"now            {sent / 1e6:10.1f} MB uploaded, {sent / done.written:.2f} x ({parts}), "
        f"{done.uploads.requests} writes"
    )
    print(f"objects        {sum(objects.values())}: {dict(objects)}")
    print(f"longest delay  {done.delay:10.1f} s")
    print(f"resident, MB   {', '.join(f'{size / 1e6:.0f}' for size in done.resident)}")


if __name__ == "__main__":
    main()
