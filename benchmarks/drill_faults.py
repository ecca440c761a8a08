"""Trainings on clusters of this machine, and faults that meet them: the parts of `benchmarks.drills`."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import psutil

from benchmarks.drill_network import Network
from cluster.jobs.placement import Placement
from cluster.jobs.server import follow, stop
from cluster.jobs.submit import build_request, send
from cluster.local import nodes as local
from cluster.local.nodes import LocalCluster, NodeOptions
from cluster.local.processes import running_with
from cluster.token import MODE_VARIABLE, PATH_VARIABLE
from pipeline.config import RunConfig
from sharding.errors import UserError

PATIENCE = 1200.0
"""Seconds after which a drill gives up to wait."""
CUT_S, DRAIN_S = 60.0, 300
"""Seconds that a node's network is cut, and seconds after which a drained node would be taken away."""
ROOM = 6 * 2**30
"""Bytes that may be used, beyond those when the cluster is up, before Ray's memory monitor kills a rank."""
_PIECE = 2**27
_HIGHEST = 0.85
_THRESHOLD = "RAY_memory_usage_threshold"
_NODE_WAIT = 600.0
_MARK = "SATFUSION_CLUSTER"


@dataclass
class Training:
    """A training on a cluster, and what it has logged."""

    cluster: LocalCluster
    config: RunConfig
    workers: int | str
    failures: int = 2
    """Restarts that the job may take."""
    network: Network | None = None
    """Network of the nodes, if it can be cut."""
    log: io.StringIO = field(default_factory=io.StringIO)
    job: str = ""
    _follower: threading.Thread | None = None

    @property
    def run(self) -> Path:
        """Return the run folder."""
        return Path(self.config.output.uri)

    def submit(self) -> None:
        """Send the training and follow its log in a thread."""
        placement = Placement(self.workers, max_failures=self.failures, wait_for_resources=_NODE_WAIT)
        self.job = send(build_request(self.config, placement, os.environ, Path.cwd()), self.cluster.address)
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def wait(self, seconds: float = PATIENCE) -> None:
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

    def places(self, since: int = 0) -> list[str]:
        """Return the addresses of the nodes that ranks were started on, by the log from a position on."""
        return [line.split()[-1] for line in self.log.getvalue()[since:].splitlines() if " runs on node " in line]

    def resumes(self) -> list[int]:
        """Return the step of each resume."""
        found = [line.partition("resuming after step ")[2] for line in self.log.getvalue().splitlines()]
        return [int(words.split()[0]) for words in found if words]

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
        try:
            return _until(happened)
        except TimeoutError as error:
            raise TimeoutError(f"{self.run.name}: {error}; the log was\n{self.log.getvalue()}") from error


def _until(happened: Callable[[], bool]) -> float:
    end = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen")
        time.sleep(0.02)
    return time.monotonic()


@contextlib.contextmanager
def cluster_of(nodes: int, state: Path, net: Network | None = None) -> Iterator[LocalCluster]:
    """Start a cluster for the block, on loopback addresses or the hosts of a network."""
    try:
        yield local.up(_options(nodes), state, net.hosts if net else ())
    finally:
        local.down(state)


def _options(nodes: int) -> NodeOptions:
    return NodeOptions(nodes=nodes, cpus_per_node=1, object_store_mb=80)


def kill(name: str, option: str = "") -> Callable[[Training], None]:
    """Return a fault that kills the first process of the cluster whose command has both words."""
    return lambda training: _kill(training.cluster, name, option)


def _kill(cluster: LocalCluster, name: str, option: str) -> None:
    found = processes(cluster, name, option)
    if not found:
        raise UserError(f"no process {name} {option} runs")
    os.kill(found[0], signal.SIGKILL)


def processes(cluster: LocalCluster, name: str, option: str) -> list[int]:
    """Return the processes of the cluster whose command has both words."""
    found = []
    for process in running_with(_MARK, cluster.mark):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if name in command and option in command:
                found.append(process.pid)
    return found


def kill_last_node(training: Training) -> None:
    """Kill the raylet of the last node that has a rank and not the head."""
    _kill(training.cluster, *_raylet(max(training.places())))


def kill_two_nodes(training: Training) -> None:
    """Kill the raylet of a node that has a rank, and of one on which the restart after it begins a rank."""
    known = len(training.log.getvalue())
    kill_last_node(training)
    head = training.cluster.nodes[0]
    training.until(lambda: bool(set(training.places(known)) - {head}))
    _kill(training.cluster, *_raylet(max(training.places(known))))


def cut_node(training: Training) -> None:
    """Cut the network of a node that has a rank for `CUT_S`, and start its raylet again when it has ended."""
    address, net = max(training.places()), training.network
    assert net is not None
    number = training.cluster.nodes.index(address)

    def supervise() -> None:
        time.sleep(CUT_S)
        net.heal(number)
        training.until(lambda: training.ended or not processes(training.cluster, *_raylet(address)))
        if not training.ended:
            options, state = _options(len(training.cluster.nodes)), Path(training.cluster.token_file).parent
            local.start_node(training.cluster, options, state, number)

    net.cut(number)
    threading.Thread(target=supervise, daemon=True).start()


def drain_node(training: Training) -> None:
    """Have Ray drain a node that has a rank, as an autoscaler does when the cloud announces that it takes it away."""
    (raylet, *_) = processes(training.cluster, *_raylet(max(training.places())))
    words = Path(f"/proc/{raylet}/cmdline").read_text().split("\0")
    node = next(word for word in words if word.startswith("--node_id=")).partition("=")[2]
    why = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=drill")
    when = f"--deadline-remaining-seconds={DRAIN_S}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={training.cluster.gcs}"]
    token = {MODE_VARIABLE: "token", PATH_VARIABLE: training.cluster.token_file}
    subprocess.run([*command, f"--node-id={node}", *why, when], check=True, env={**os.environ, **token})


def _raylet(address: str) -> tuple[str, str]:
    return "raylet/raylet", f"--node_ip_address={address} "


def watch_memory(cluster: LocalCluster) -> None:
    """Start the last node again, with a threshold of Ray's memory monitor that is `ROOM` above what is used now.

    The nodes of this machine share its memory. The monitors of the others keep Ray's threshold, 95 %.

    Raises:
        UserError: The machine has too little memory left for that.
    """
    number, address = len(cluster.nodes) - 1, cluster.nodes[-1]
    _kill(cluster, *_raylet(address))
    _until(lambda: address not in local.alive_nodes(cluster))
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + ROOM) / memory.total
    if threshold > _HIGHEST:
        raise UserError(
            f"the drill needs {ROOM / 2**30:.0f} GiB below {_HIGHEST:.0%} of the machine's memory: free some"
        )
    with mock.patch.dict(os.environ, {_THRESHOLD: f"{threshold:.4f}"}):
        local.start_node(cluster, _options(len(cluster.nodes)), Path(cluster.token_file).parent, number)
    _until(lambda: address in local.alive_nodes(cluster))


def use_memory(training: Training) -> None:
    """Use more and more memory until Ray has killed the rank of the last node, then free it."""
    (raylet,) = processes(training.cluster, *_raylet(training.cluster.nodes[-1]))
    (rank,) = (child for child in psutil.Process(raylet).children() if "RayTrainWorker" in " ".join(child.cmdline()))
    memory = psutil.virtual_memory
    limit = float(psutil.Process(raylet).environ()[_THRESHOLD]) * memory().total
    used = list[bytearray]()
    while rank.is_running():
        if sum(map(len, used)) > 2 * ROOM:
            raise UserError(f"Ray's memory monitor killed no rank, though {2 * ROOM / 2**30:.0f} GiB more are used")
        left = limit - (memory().total - memory().available)
        used.append(bytearray(b"x") * max(_PIECE, int(left / 2)))
        time.sleep(0.3)  # The monitor looks every 250 ms.


def kill_head(training: Training) -> None:
    """Kill every process of the cluster, as when the head's machine is lost."""
    for process in running_with(_MARK, training.cluster.mark):
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGKILL)


def ask_to_stop(training: Training) -> None:
    """Stop the job as a user does."""
    stop(training.cluster.address, training.job)
