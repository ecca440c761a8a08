"""Faults on real Ray nodes, and what they cost: ``python -m benchmarks.drills [FAULT ...]``, or ``make drills``.

Each drill has a cluster of its own on this machine and a training of its own, with the same configuration as one that
nothing disturbs. It prints when the fault was noticed, when the run was further than before it, how many steps were
taken twice, and whether weights and order of chips are the undisturbed run's.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.drill_faults import (
    PATIENCE,
    Training,
    ask_to_stop,
    cluster_of,
    cut_node,
    drain_node,
    kill,
    kill_head,
    kill_last_node,
    kill_two_nodes,
    use_memory,
    watch_memory,
)
from benchmarks.drill_network import available, network
from benchmarks.results import columns
from pipeline.config import RunConfig, load_config
from pipeline.training.checkpoint import newest_checkpoint
from sharding.errors import UserError
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import Storage, open_storage

STEPS, INTERVAL, AT = 60, 10, 25
"""Steps of a training, steps between checkpoints, and the step from which on the fault comes."""
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
    watched: bool = False
    """Whether Ray's memory monitor of the last node acts when some more memory of this machine is used."""
    cut: bool = False
    """Whether the nodes are hosts of their own whose network can be cut, which needs root."""


FAULTS = {
    "rank": Fault("SIGKILL of a rank", 2, 2, kill("ray::RayTrainWorker"), "restart 1 of"),
    "node": Fault("raylet of a rank's node killed, another node is there", 3, 2, kill_last_node, "restart 1 of"),
    "lost": Fault("raylet of a rank's node killed, no other is there (1..2)", 2, "1..2", kill_last_node, "1 ranks of"),
    "controller": Fault("SIGKILL of Ray Train's controller", 2, 2, kill("ray::TrainController"), "restart 1 of"),
    "stop": Fault("stopped, submitted again", 2, 2, ask_to_stop, "the job was stopped", again=True),
    "cut": Fault("network of a rank's node cut for 60 s, raylet restarted", 2, 2, cut_node, "restart 1 of", cut=True),
    "two": Fault("raylets of two nodes killed, one in the restart", 4, 2, kill_two_nodes, "restart 2 of"),
    "drain": Fault("a rank's node drained, another node is there", 3, 2, drain_node, "Ray drains node"),
    "memory": Fault("a rank killed by Ray's memory monitor", 2, 2, use_memory, "memory monitor killed", watched=True),
    "head": Fault("all processes of the cluster killed, submitted to a new one", 2, 2, kill_head, "", again=True),
}


def shard_scenes(folder: Path, to: Storage) -> None:
    """Generate a dataset of 8 scenes of 9 chips; ``folder`` holds its source meanwhile."""
    write_worldstrat(folder / "source", 8, seed=1, revisits=2, hr_side=80)
    options = ShardOptions(SampleOptions(revisits=2, lr_size=150, hr_size=200))
    shard_folder(folder / "source", to, options, workers=1)
    shutil.rmtree(folder / "source")


def undisturbed(config: RunConfig, state: Path) -> Training:
    """Train without a fault, on a cluster of its own with its state in a folder."""
    steps = config.train.max_steps
    with cluster_of(2, state) as cluster:
        training = Training(cluster, config, 2)
        training.submit()
        training.wait(PATIENCE + 3 * steps)
    if training.step() != steps:
        raise UserError(f"the undisturbed training did not end: {training.log.getvalue()[-2000:]}")
    return training


def drill(name: str, data: Path, folder: Path, reference: Training) -> list[str]:
    """Do one drill and return its row of the table."""
    fault = FAULTS[name]
    made = network(fault.nodes) if fault.cut else contextlib.nullcontext()
    with made as net, cluster_of(fault.nodes, folder / "c", net) as cluster:
        if fault.watched:
            watch_memory(cluster)
        training = Training(cluster, configured(data, folder / name), fault.workers, network=net)
        training.submit()
        training.until(lambda: training.step() >= AT)
        before, began = training.step(), time.monotonic()
        fault.strike(training)
        noticed = None
        if fault.noticed:
            noticed = training.until(lambda: fault.noticed in training.log.getvalue()) - began
            before = training.step()  # ranks may have gone on until then
        if not fault.again:
            recovered = training.until(lambda: bool(training.resumes()) and training.step() > before) - began
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
    after = min(training.resumes(), default=0)
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
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"{', '.join(FAULTS)}; default all (cut needs root)")
    given = parser.parse_args(arguments)
    names = given.faults or [name for name, fault in FAULTS.items() if available() or not fault.cut]
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
