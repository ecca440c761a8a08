"""The whole line on one machine: S3 server, shards, two Ray nodes, training, evaluation; then everything is ended."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cluster import local
from cluster.objectstore import ObjectStore
from cluster.submit import build_request, follow, send
from cluster.worker import Placement
from pipeline.config import load_config
from pipeline.evaluate import Evaluation, evaluate_run
from pipeline.signals import sigterm_as_interrupt
from sharding.cli import describe
from sharding.errors import UserError
from sharding.progress import progress
from sharding.shard import ShardOptions, shard_folder
from sharding.storage import open_storage
from sharding.synthetic import write_worldstrat

logger = logging.getLogger(__name__)

NODES = 2
GENERATED_AOIS = 10
GENERATED_SEED = 20251007
BUCKET = "satfusion"
_MARK = ".satfusion-demo"


def run_demo(output: Path, worldstrat: Path | None, overrides: Sequence[str] = ()) -> int:
    """Run the demo and return its exit status.

    Args:
        output: Folder for everything it makes; an earlier demo's is replaced.
        worldstrat: Real data in WorldStrat's layout; None makes scenes.
        overrides: Of the recipe ``demo``.

    Raises:
        UserError: The folder is not a demo's, the data cannot be used, or a part does not come up.
    """
    began = time.monotonic()
    dataset, run = f"s3://{BUCKET}/dataset", f"s3://{BUCKET}/run"
    config = load_config("demo", [f"data.uri={dataset}", f"output.uri={run}", *overrides])
    state = _prepare(output)
    with sigterm_as_interrupt(), ObjectStore(output / "s3", BUCKET) as store, _environment(store.environment):
        source = worldstrat or _generate(output / "worldstrat")
        _say(f"sharding {source} to {dataset}")
        storage = open_storage(dataset)
        index = shard_folder(source, storage, ShardOptions(), workers=NODES, say=_say)
        print(*describe(index, storage), sep="\n", flush=True)
        with _cluster(state) as address:
            _say(f"training on {NODES} Ray nodes, job server {address}")
            job = send(build_request(config, Placement(NODES), os.environ, Path.cwd()), address)
            status = follow(address, job, sys.stdout)
        if status == 0:
            result = evaluate_run(run, "test", "best")
        _fetch(run, output / "run")
    shutil.rmtree(output / "s3")
    if status == 0:
        _report(result, output, time.monotonic() - began)
    return status


def _prepare(output: Path) -> Path:
    """Make an empty output folder, and return a folder for the cluster's state.

    Ray puts sockets there, whose paths the kernel bounds to 107 characters, so it stands in the temporary folder; the
    mark in the output folder names it, for the demo after one that was killed.
    """
    mark = output / _MARK
    if output.exists() and any(output.iterdir()):
        if not mark.exists():
            raise UserError(f"--output {output} holds files that no demo made: name an empty or new folder")
        local.down(Path(mark.read_text()))
        shutil.rmtree(output)
    (output / "s3").mkdir(parents=True)
    state = Path(tempfile.mkdtemp(prefix="satfusion-demo-"))
    mark.write_text(str(state))
    return state


def _generate(folder: Path) -> Path:
    _say(f"making {GENERATED_AOIS} scenes in {folder}")
    write_worldstrat(folder, GENERATED_AOIS, GENERATED_SEED)
    return folder


@contextlib.contextmanager
def _cluster(state: Path) -> Iterator[str]:
    """Run a local Ray cluster for the block and give its job server's address."""
    try:
        yield local.up(local.NodeOptions(NODES), state).address
    finally:
        local.down(state)
        shutil.rmtree(state, ignore_errors=True)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the block; the Ray nodes and what runs in them inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _fetch(run: str, folder: Path) -> None:
    """Copy the run folder, so that it outlives the server."""
    source, target = open_storage(run), open_storage(folder)
    files = source.list()
    with progress(len(files), "fetching the run", "file") as bar:
        for stored in files:
            target.write(stored.key, source.read(stored.key))
            bar.update()


def _report(result: Evaluation, output: Path, seconds: float) -> None:
    folder = output / "run" / "evaluation" / f"{result.split}-{result.checkpoint}"
    print(f"\ncheckpoint rule: best, the least validation loss ({result.checkpoint})")
    print(result.table())
    for column, name in (("psnr", "raw"), ("psnr_adjusted", "adjusted")):
        fused, baseline = result.margin(column)
        verdict = "above" if fused > baseline else "NOT above"
        print(f"fused {name} PSNR {fused:.2f} dB lies {verdict} the better baseline's {baseline:.2f} dB")
    print(f"pictures: {folder}/panel-*.png, {output / 'run' / 'images'}")
    print(f"figures:  {folder}/chips.csv, {folder}/aois.csv, {output / 'run' / 'metrics.csv'}")
    print(f"watch it: satfusion monitor {output / 'run'}")
    print(f"done in {seconds / 60:.1f} minutes; everything it started has been ended")


def _say(line: str) -> None:
    print(f"demo: {line}", flush=True)
