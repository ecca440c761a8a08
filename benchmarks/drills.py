"""Faults on real Ray nodes, and what they cost: ``python -m benchmarks.drills [FAULT ...]``, or ``make drills``.

Each drill has a cluster of its own on this machine and a training of its own, with the same configuration as one that
nothing disturbs. It prints when the fault was noticed, when the run was further than before it, how many steps were
taken twice, and whether weights and order of chips are the undisturbed run's.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.results import columns
from cluster.jobs.placement import Placement
from cluster.jobs.server import follow, stop
from cluster.jobs.submit import build_request, send
from cluster.local import nodes as local
from cluster.local.nodes import LocalCluster, NodeOptions
from cluster.local.processes import running_with
from pipeline.config import RunConfig, load_config
from pipeline.training.checkpoint import newest_checkpoint
from sharding.errors import UserError
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import Storage, open_storage

STEPS, INTERVAL, AT = 60, 10, 25
"""Steps of a training, steps between checkpoints, and the step from which on the fault comes."""
_MARK = "SATFUSION_CLUSTER"
_PATIENCE = 1200.0
_CONFIG = (
    "model.hidden=8",
    "model.revisits=2",
    "train.global_batch=12",
    "train.learning_rate=1e-3",
    "train.epochs=1000",
    "train.log_every=5",
    "train.log_batches=true",
    "train.threads_per_rank=1",
    "output.panels=0",
    f"train.checkpoint_every={INTERVAL}",
)


@dataclass
class Training:
    """A training on a cluster, and what it has logged."""

    cluster: LocalCluster
    config: RunConfig
    workers: int | str
    failures: int = 2
    """Restarts that the job may take."""
    log: io.StringIO = field(default_factory=io.StringIO)
    job: str = ""
    _follower: threading.Thread | None = None

    @property
    def run(self) -> Path:
        """Return the run folder."""
        return Path(self.config.output.uri)

    def submit(self) -> None:
        """Send the training and follow its log in a thread."""
        self.job = send(
            build_request(self.config, Placement(self.workers, max_failures=self.failures), os.environ, Path.cwd()),
            self.cluster.address,
        )
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def wait(self, seconds: float = _PATIENCE) -> None:
        """Wait until the job has ended or its head is lost, or for so long."""
        assert self._follower is not None
        self._follower.join(max(0.0, seconds))

    @property
    def ended(self) -> bool:
        """Return whether the job has ended or its head is lost."""
        return self._follower is not None and not self._follower.is_alive()

    def _follow(self) -> None:
        with contextlib.suppress(UserError):  # The head was killed.
            follow(self.cluster.address, self.job, self.log)

    def step(self) -> int:
        """Return the last step in the run's table; 0 without one."""
        rows = self.column("step")
        return int(rows[-1]) if rows else 0

    def column(self, name: str, file: str = "metrics.csv") -> list[str]:
        """Return a column of one of the run's tables."""
        if not (self.run / file).exists():
            return []
        with (self.run / file).open(newline="") as rows:
            return [row[name] for row in csv.DictReader(rows) if row[name]]

    def until(self, happened: Callable[[], bool]) -> float:
        """Wait for something, and return the time at which it happened."""
        end = time.monotonic() + _PATIENCE
        while not happened():
            if time.monotonic() > end:
                raise TimeoutError(f"{self.run.name}: it did not happen; the log was\n{self.log.getvalue()}")
            time.sleep(0.02)
        return time.monotonic()


@dataclass(frozen=True)
class Fault:
    """One fault."""

    about: str
    """What happens, in words."""
    nodes: int
    """Nodes of the cluster."""
    workers: int | str
    """Ranks of the job."""
    strike: Callable[[Training], None]
    """Causes the fault."""
    noticed: str
    """Words of the log by which the driver says that it has noticed; empty if it cannot."""
    again: bool = False
    """Whether the run is submitted again, to a new cluster if the head is lost."""


def kill(name: str, option: str = "") -> Callable[[Training], None]:
    """Return a fault that kills the first process of the cluster whose command has both words."""

    def strike(training: Training) -> None:
        for process in running_with(_MARK, training.cluster.mark):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if name in command and option in command:
                    os.kill(process.pid, signal.SIGKILL)
                    return
        raise UserError(f"no process {name} {option} runs")

    return strike


def kill_last_node(training: Training) -> None:
    """Kill the raylet of the last node that has a rank and not the head."""
    places = [line.split()[-1] for line in training.log.getvalue().splitlines() if " runs on node " in line]
    kill("raylet/raylet", f"--node_ip_address={max(set(places))}")(training)


def kill_head(training: Training) -> None:
    """Kill every process of the cluster, as when the head's machine is lost."""
    for process in running_with(_MARK, training.cluster.mark):
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGKILL)


def ask_to_stop(training: Training) -> None:
    """Stop the job as a user does."""
    stop(training.cluster.address, training.job)


FAULTS = {
    "rank": Fault("SIGKILL of a rank", 2, 2, kill("ray::RayTrainWorker"), "restart 1 of"),
    "node": Fault("raylet of a rank's node killed, another node is there", 3, 2, kill_last_node, "restart 1 of"),
    "lost": Fault("raylet of a rank's node killed, no other is there (1..2)", 2, "1..2", kill_last_node, "1 ranks of"),
    "controller": Fault("SIGKILL of Ray Train's controller", 2, 2, kill("ray::TrainController"), "restart 1 of"),
    "stop": Fault("stopped, submitted again", 2, 2, ask_to_stop, "the job was stopped", again=True),
    "head": Fault("all processes of the cluster killed, submitted to a new one", 2, 2, kill_head, "", again=True),
}


def shard_scenes(folder: Path, to: Storage) -> None:
    """Generate a dataset of 8 scenes of 9 chips; ``folder`` holds its source meanwhile."""
    write_worldstrat(folder / "source", 8, seed=1, revisits=2, hr_side=80)
    options = ShardOptions(SampleOptions(revisits=2, lr_size=150, hr_size=200))
    shard_folder(folder / "source", to, options, workers=1)
    shutil.rmtree(folder / "source")


@contextlib.contextmanager
def cluster_of(nodes: int, state: Path) -> Iterator[LocalCluster]:
    """Start a cluster for the block."""
    try:
        yield local.up(NodeOptions(nodes=nodes, cpus_per_node=1, object_store_mb=80), state)
    finally:
        local.down(state)


def undisturbed(config: RunConfig, state: Path) -> Training:
    """Train without a fault, on a cluster of its own with its state in a folder."""
    steps = config.train.max_steps
    with cluster_of(2, state) as cluster:
        training = Training(cluster, config, 2)
        training.submit()
        training.wait(_PATIENCE + 3 * steps)
    if training.step() != steps:
        raise UserError(f"the undisturbed training did not end: {training.log.getvalue()[-2000:]}")
    return training


def drill(name: str, data: Path, folder: Path, reference: Training) -> list[str]:
    """Do one drill and return its row of the table."""
    fault = FAULTS[name]
    with cluster_of(fault.nodes, folder / "c") as cluster:
        training = Training(cluster, configured(data, folder / name), fault.workers)
        training.submit()
        training.until(lambda: training.step() >= AT)
        before, began = training.step(), time.monotonic()
        fault.strike(training)
        noticed = None
        if fault.noticed:
            noticed = training.until(lambda: fault.noticed in training.log.getvalue()) - began
            before = training.step()  # ranks may have gone on until then
        if not fault.again:
            recovered = training.until(lambda: training.step() > before) - began
            training.wait()
        elif fault.noticed:
            training.wait()
            training.submit()
            recovered = training.until(lambda: training.step() > before) - began
            training.wait()
    if fault.again and not fault.noticed:
        with cluster_of(fault.nodes, folder / "c") as cluster:
            training.cluster = cluster
            training.submit()
            recovered = training.until(lambda: training.step() > before) - began
            training.wait()
    resumed = [line for line in training.log.getvalue().splitlines() if "resuming after step" in line]
    after = int(resumed[-1].partition("resuming after step ")[2].split()[0]) if resumed else 0
    return [
        fault.about,
        "-" if noticed is None else f"{noticed:.1f}",
        f"{recovered:.1f}",
        str(max(0, before - after)),
        compared(training, reference),
    ]


def compared(training: Training, reference: Training) -> str:
    """Return in words whether a training ended like the undisturbed one."""
    if training.step() != reference.step():
        return f"NO: it ended at step {training.step()}"
    if training.column("chips", "batches.csv") != reference.column("chips", "batches.csv"):
        return "NO: other chips"
    ours, theirs = (newest_checkpoint(open_storage(one.run)) for one in (training, reference))
    assert ours is not None
    assert theirs is not None
    if all(torch.equal(ours.state.weights[name], value) for name, value in theirs.state.weights.items()):
        return "yes, bit for bit"
    pairs = zip(training.column("train/loss"), reference.column("train/loss"), strict=True)
    return f"chips yes, losses to {max(abs(float(a) / float(b) - 1) for a, b in pairs):.0e}"


def configured(data: str | Path, run: Path, *more: str) -> RunConfig:
    """Return a training's configuration, `STEPS` steps unless ``more`` keys say otherwise."""
    return load_config(
        "srcnn_pnn", [*_CONFIG, f"train.max_steps={STEPS}", f"data.uri={data}", f"output.uri={run}", *more]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the drills and print their table; exit status 1 if a run did not end like the undisturbed one."""
    parser = argparse.ArgumentParser(prog="benchmarks.drills", description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"{', '.join(FAULTS)}; default all")
    given = parser.parse_args(arguments)
    names = given.faults or list(FAULTS)
    if unknown := sorted(set(names) - set(FAULTS)):
        parser.error(f"unknown fault {unknown[0]!r}: choose from {', '.join(FAULTS)}")
    rows = [["fault", "noticed s", "recovered s", "steps lost", "equal"]]
    # Short enough for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="sf-") as name:
        folder = Path(name)
        shard_scenes(folder, open_storage(folder / "data"))
        reference = undisturbed(configured(folder / "data", folder / "undisturbed"), folder / "c")
        for fault in names:
            rows.append(drill(fault, folder / "data", folder, reference))
            print("\n".join(columns(rows)), flush=True)
    return int(any(row[-1].startswith("NO") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
