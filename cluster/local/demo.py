"""All steps on one machine: S3 server, shards, two Ray nodes, training, evaluation; then everything is stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cluster.jobs.placement import Placement
from cluster.jobs.server import follow
from cluster.jobs.submit import build_request, send
from cluster.local import nodes as local
from cluster.local.objectstore import ObjectStore, remove_sockets
from cluster.local.processes import ProcessId, identify, is_running
from pipeline.config import RunConfig, load_config
from pipeline.evaluation.evaluate import evaluate_run
from pipeline.evaluation.result import Evaluation
from pipeline.reporting.run_folder import CONFIG_FILE
from pipeline.training.resume import RUN_NAMES
from sharding.errors import UserError
from sharding.inspection.describe import describe
from sharding.progress import progress
from sharding.run.dataset import shard_folder
from sharding.run.job import ShardOptions
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage
from sharding.storage.local import TEMPORARY_PREFIX
from sharding.terminal import say

logger = logging.getLogger(__name__)

NODES = 2
GENERATED_AOIS = 10
GENERATED_SEED = 20251007
BUCKET = "satfusion"
_AGAIN_S = 10.0
"""Seconds after which an interruption that has led to no clean-up is raised again."""
_MARK = ".satfusion-demo"
_OWN_AWS = ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
_LOOPBACK = "127.0.0.1,localhost"
_STATE_PREFIX = "sf-demo-"
_MARKED = re.compile(
    rf"(?P<pid>[1-9]\d{{0,9}})\n(?P<since>\d{{1,18}})\n(?P<state>/(?:[^\x00/\n]+/)*{re.escape(_STATE_PREFIX)}[^\x00/\n]+)"
)
_MOST_MARK = 8192
_OURS: dict[str, tuple[str, ...]] = {
    "s3": (),
    "worldstrat": ("hr_dataset", "lr_dataset", "stratified_train_val_test_split.csv"),
    "run": (CONFIG_FILE, *(name.rstrip("/") for name in RUN_NAMES), "evaluation", "metrics.csv.parts"),
}
"""Folders of an output, and what a demo writes in each; in the S3 server's, anything."""


def run_demo(output: Path, worldstrat: Path | None, overrides: Sequence[str] = ()) -> int:
    """Run the demo and return its exit status: the job's if not 0, 1 if the fused image is not above both baselines.

    On every exit the servers and nodes that it started are stopped, and the S3 server's data and keys are removed.

    Args:
        output: Folder for all output; the output of an earlier demo is overwritten.
        worldstrat: Real data in WorldStrat's layout; None generates scenes.
        overrides: Overrides of the recipe ``demo``.

    Raises:
        UserError: The folder is not a demo's, the data cannot be used, or a server does not start.
    """
    began = time.monotonic()
    dataset, run = f"s3://{BUCKET}/dataset", f"s3://{BUCKET}/run"
    taken = [override for override in overrides if override.startswith(("data.uri", "output.uri"))]
    if taken:
        raise UserError(f"the demo sets the paths of its data and run: remove {taken[0]!r}")
    config = load_config("demo", [f"data.uri={dataset}", f"output.uri={run}", *overrides])
    with _interruptible() as ignore_signals, contextlib.ExitStack() as started:
        try:
            state = _prepare(output, started)
            _start_store(output / "s3", started)
            source = worldstrat or _generate(output / "worldstrat")
            _say(f"sharding {source} to {dataset}")
            storage = open_storage(dataset)
            report = shard_folder(source, storage, ShardOptions(), workers=NODES, say=_say)
            for line in describe(report.index, storage):
                say(line)
            status = _train(config, state)
            result = evaluate_run(run, "test", "best") if status == 0 else None
            _fetch(run, output / "run")
        finally:
            ignore_signals()
    if result is None:
        return status
    return 0 if _report(result, output, time.monotonic() - began) else 1


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Turn every Ctrl-C, SIGTERM and SIGHUP in the block into `KeyboardInterrupt`.

    Yield a function to call before the clean-up; from then on these signals are ignored. Until then the exception is
    raised again from time to time, since a library may swallow it.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)

    def ignore() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    def interrupt(number: int, frame: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare(output: Path, started: contextlib.ExitStack) -> Path:
    """Make an empty output folder, and return a folder for the cluster's state, which is removed with ``started``.

    Ray puts sockets there, and the kernel limits their paths to 107 characters, so the folder is in the temporary
    folder. A marker file in the output folder names it, so that the next demo can clean up after a killed one, and
    names the process, so that a second demo at the same time is refused.
    """
    mark = output / _MARK
    try:
        if output.exists() and any(output.iterdir()):
            _remove_last(output)
        output.mkdir(parents=True, exist_ok=True)
        state = Path(
            started.enter_context(tempfile.TemporaryDirectory(prefix=_STATE_PREFIX, ignore_cleanup_errors=True))
        )
        own = identify(os.getpid())
        assert own is not None
        mark.write_text(f"{own.pid}\n{own.started}\n{state}")
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be used ({error.strerror or error}): name an empty or new folder"
        ) from error
    started.callback(local.down, state)
    return state


def _remove_last(output: Path) -> None:
    """Remove the output of an earlier demo, and what it left elsewhere if it was killed.

    Raises:
        UserError: The folder is no demo's, holds files that no demo writes, or is in use; then nothing is removed.
    """
    mark = output / _MARK
    if not mark.is_file() or mark.is_symlink():
        raise UserError(f"--output {output} holds files that are not from a demo: name an empty or new folder")
    with mark.open("rb") as file:
        found = _MARKED.fullmatch(file.read(_MOST_MARK).decode(errors="replace"))
    if found is None:
        raise UserError(f"{mark} is not the mark of a demo: move the folder away, or name another --output")
    pid, since, state = int(found["pid"]), int(found["since"]), Path(found["state"])
    if is_running(ProcessId(pid, since)):
        raise UserError(f"--output {output} is in use by a demo that runs (process {pid}): name another folder")
    foreign = sorted(
        path for path in (*output.iterdir(), *output.glob("*/*")) if not _is_ours(path.relative_to(output))
    )
    if foreign:
        raise UserError(f"{foreign[0]} is not from a demo: nothing was changed; move it away, or name another --output")
    local.down(state)
    with contextlib.suppress(OSError):  # absent, or not empty
        state.rmdir()
    remove_sockets(output / "s3")
    for name in _OURS:
        if (output / name).exists():
            shutil.rmtree(output / name)
    mark.unlink()


def _is_ours(path: Path) -> bool:
    """Return True for a path in the output, of one or two parts, that a demo may have written."""
    if len(path.parts) == 1:
        return path.name == _MARK or path.name in _OURS
    folder, name = path.parts
    known = _OURS.get(folder)
    return not known or name in known or name.startswith(TEMPORARY_PREFIX)


def _start_store(folder: Path, started: contextlib.ExitStack) -> None:
    """Start the S3 server and set its variables; ``started`` undoes both, and removes the folder with data and keys."""
    folder.mkdir()
    started.callback(shutil.rmtree, folder, ignore_errors=True)
    store = ObjectStore(folder, BUCKET)
    started.enter_context(_environment(store.environment))
    started.enter_context(store)
    _say("S3 server ready")


def _generate(folder: Path) -> Path:
    _say(f"making {GENERATED_AOIS} scenes in {folder}")
    write_worldstrat(folder, GENERATED_AOIS, GENERATED_SEED)
    return folder


def _train(config: RunConfig, state: Path) -> int:
    """Train on a local Ray cluster, end it, and return the job's exit status."""
    address = local.up(local.NodeOptions(NODES), state).address
    _say(f"training on {NODES} Ray nodes, job server {address}")
    job = send(build_request(config, Placement(NODES), os.environ, Path.cwd()), address)
    status = follow(address, job, sys.stdout)
    local.down(state)  # The following steps need the nodes' CPUs.
    return status


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the block, and remove the user's own that would override them or be sent with a job.

    The Ray nodes and their processes inherit the variables.
    """
    proxies = {name: ",".join(filter(None, [os.environ.get(name), _LOOPBACK])) for name in ("NO_PROXY", "no_proxy")}
    before = {name: os.environ.get(name) for name in (*values, *proxies, *_OWN_AWS)}
    for name in _OWN_AWS:
        os.environ.pop(name, None)
    os.environ.update({**values, **proxies})
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


def _report(result: Evaluation, output: Path, seconds: float) -> bool:
    """Print the results, and return whether the fused image is above both baselines, raw and adjusted."""
    folder = output / "run" / "evaluation" / result.folder.rpartition("/")[2]
    passed = True
    say("")
    say(f"checkpoint rule: best, the least validation loss ({result.checkpoint})")
    for line in result.table().split("\n"):
        say(line)
    for column, name in (("psnr", "raw"), ("psnr_adjusted", "adjusted")):
        fused, baseline = result.margin(column)
        verdict = "above" if fused > baseline else "NOT above"
        passed &= fused > baseline
        say(f"fused {name} PSNR {fused:.2f} dB lies {verdict} the better baseline's {baseline:.2f} dB")
    say(f"pictures: {folder}/panel-*.png, {output / 'run' / 'images'}")
    say(f"figures:  {folder}/chips.csv, {folder}/aois.csv, {output / 'run' / 'metrics.csv'}")
    say(f"watch it: satfusion monitor {output / 'run'}")
    say(f"done in {seconds / 60:.1f} minutes; everything it started has been stopped")
    return passed


def _say(line: str) -> None:
    say(f"demo: {line}")
