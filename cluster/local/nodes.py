"""A real multi-node Ray cluster on this machine: each node has its own loopback address, from 127.0.0.2 up.

Every user of the machine can connect to loopback addresses, so Ray's services answer only requests with the cluster's
token. It is in a file that only its owner can read, in the state folder; `cluster.token` finds it for an address.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from cluster.local.processes import ProcessId, free_ports, is_running, running_with, stop
from cluster.loopback.library import LIBRARY, build_library, confined
from cluster.token import (
    MODE_VARIABLE,
    PATH_VARIABLE,
    SERVER_VARIABLE,
    TOKEN_VARIABLE,
    ask,
    authorization,
    create_token,
)
from sharding.arguments import check_values
from sharding.errors import UserError
from sharding.schema import decode

logger = logging.getLogger(__name__)

_MARK = "SATFUSION_CLUSTER"
_STATE, _RAY, _LOGS, _TOKEN, _TEMPORARY = "state.json", "ray", "logs", "token", "tmp"
_START_SECONDS = 120.0
_DASHBOARD_SECONDS = 120.0
# A Unix socket's path has at most 107 bytes, and Ray appends this many to its folder.
_RAY_SOCKET_PATH = 64
_MAX_NODES = 200


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster, as recorded in the state file."""

    mark: str
    """Value of ``SATFUSION_CLUSTER`` in the environment of every process of this cluster."""
    address: str
    """URL of the dashboard and job server, for ``satfusion submit --address``."""
    gcs: str
    """``host:port`` of the head's control service, for ``ray.init``."""
    nodes: tuple[str, ...]
    """Address of each node; the first is the head."""
    cpus_per_node: int
    """CPUs of each node that Ray may assign."""
    gpus_per_node: int
    """GPUs of each node that Ray may assign."""
    processes: tuple[ProcessId, ...] = ()
    """The processes that ran when ``up`` ended; empty while ``up`` runs."""
    token_file: str = ""
    """Path of the file with the token that Ray's services ask for. The token itself is in no record."""
    enter: tuple[tuple[str, ...], ...] = ()
    """Words before the commands of each node, if the nodes are hosts of their own; empty if all are on loopback."""


@dataclass(frozen=True)
class Host:
    """Host of a node with a network of its own, such as a network namespace."""

    address: str
    """IPv4 address, which the other hosts and this process reach."""
    enter: tuple[str, ...]
    """Words before a command that runs on it, such as ``ip netns exec NAME``."""


@dataclass(frozen=True)
class NodeOptions:
    """Size of the local cluster."""

    nodes: Annotated[int, Meta(ge=1, le=_MAX_NODES)] = 2
    """Number of Ray nodes, 1 to 200."""
    cpus_per_node: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    """CPUs of each node; None divides this machine's CPUs by the nodes, at least one each."""
    gpus_per_node: Annotated[int, Meta(ge=0, le=1000)] = 0
    """GPUs of each node; node i takes this machine's GPUs ``i*n`` to ``i*n + n - 1``."""
    object_store_mb: Annotated[int, Meta(ge=80, le=10**7)] = 200
    """Shared memory of each node for Ray's objects, MiB; at least 80. Training sends none of its data through it."""

    def __post_init__(self) -> None:
        check_values(self)


def default_state() -> Path:
    """Return the folder of this user's cluster, ``satfusion-cluster-<uid>`` below the temporary folder."""
    return Path(tempfile.gettempdir()) / f"satfusion-cluster-{os.getuid()}"


def up(options: NodeOptions, state: Path, hosts: Sequence[Host] = ()) -> LocalCluster:
    """Start the nodes and the job server, and wait until they answer.

    Args:
        options: Size of the cluster.
        state: Folder for the state that ``down`` needs, Ray's files and its logs; created if absent.
        hosts: Host of each node; none for loopback addresses.

    Raises:
        UserError: A cluster is up in ``state`` already, or the new one does not start. Nothing is left behind then.
    """
    existing = read_state(state)
    if existing is not None:
        if _alive(existing):
            raise UserError(
                f"a cluster of {len(existing.nodes)} nodes is already up at {existing.address}: "
                "take it down with `satfusion cluster down`"
            )
        down(state)  # Remains of a cluster that ended without ``down``, for example by a reboot.
    _claim(state)
    cpus = options.cpus_per_node or max(1, (os.cpu_count() or 1) // options.nodes)
    gcs_port, dashboard_port = free_ports(2)
    nodes = tuple(host.address for host in hosts) or tuple(f"127.0.0.{2 + i}" for i in range(options.nodes))
    cluster = LocalCluster(
        mark=secrets.token_hex(8),
        address=f"http://{nodes[0] if hosts else '127.0.0.1'}:{dashboard_port}",
        gcs=f"{nodes[0]}:{gcs_port}",
        nodes=nodes,
        cpus_per_node=cpus,
        gpus_per_node=options.gpus_per_node,
        token_file=str(state.resolve() / _TOKEN),
        enter=tuple(host.enter for host in hosts),
    )
    _write_state(state, cluster)
    try:
        create_token(Path(cluster.token_file))
        _start_nodes(cluster, options, state)
        _wait_for_nodes(cluster)
        cluster = LocalCluster(**{**vars(cluster), "processes": tuple(running_with(_MARK, cluster.mark))})
        _write_state(state, cluster)
    except BaseException:
        down(state)
        raise
    return cluster


def down(state: Path) -> LocalCluster | None:
    """End exactly the processes that ``up`` started and remove its files; return None if nothing was up."""
    cluster = read_state(state)
    if cluster is None:
        return None
    # A process that was being started while the others ended appears in the next iteration.
    while alive := _alive(cluster):
        stop(alive)
    for name in (_RAY, _LOGS, _TEMPORARY):
        shutil.rmtree(state / name, ignore_errors=True)
    for name in (LIBRARY, _TOKEN, f"{_STATE}.new", _STATE):
        (state / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # Not empty: the folder is the user's own.
        state.rmdir()
    return cluster


def read_state(state: Path) -> LocalCluster | None:
    """Return the cluster recorded in the state folder, or None if there is none.

    Raises:
        UserError: The state file cannot be understood, or another user could have written it.
    """
    path = state / _STATE
    _refuse_foreign(state)
    try:
        content = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not content:  # Another `up` has just claimed the folder.
        raise UserError(f"another `satfusion cluster up` is running in {state}: wait for it, or remove {path}")
    try:
        return decode(content, LocalCluster)
    except ValueError as error:
        raise UserError(f"{path} is not the state of a cluster ({error}): remove it") from error


def alive_nodes(cluster: LocalCluster) -> list[str]:
    """Return the addresses of the nodes that Ray counts as alive; none if its dashboard does not answer."""
    try:
        token = authorization(Path(cluster.token_file)) if cluster.token_file else {}
        summary = decode(ask(f"{cluster.address}/nodes?view=summary", token, 10), _Answer).data.summary
    except (OSError, ValueError):
        return []
    # A node that has just joined is listed before its agent has reported its address.
    return sorted(node.ip for node in summary if node.ip and node.raylet and node.raylet.state == "ALIVE")


class _Raylet(msgspec.Struct):
    state: str | None = None


class _Node(msgspec.Struct):
    ip: str | None = None
    raylet: _Raylet | None = None


class _Summary(msgspec.Struct):
    summary: tuple[_Node, ...]


class _Answer(msgspec.Struct):
    """Schema of the dashboard's answer on its nodes."""

    data: _Summary


def _alive(cluster: LocalCluster) -> list[ProcessId]:
    recorded = {process for process in cluster.processes if is_running(process)}
    return sorted(recorded | set(running_with(_MARK, cluster.mark)), key=lambda process: process.pid)


def _claim(state: Path) -> None:
    if len(str(state.resolve())) + len(f"/{_RAY}/{_MAX_NODES}") + _RAY_SOCKET_PATH > 107:
        raise UserError(
            f"the path {state} is too long for the sockets Ray makes below it: choose a shorter --state or TMPDIR"
        )
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_foreign(state)
        if not (state / _STATE).exists():
            _refuse_files(state)
        (state / _STATE).touch(mode=0o600, exist_ok=False)
    except FileExistsError as error:
        raise UserError(f"another `satfusion cluster up` is running in {state}: wait for it") from error
    except OSError as error:
        raise UserError(
            f"cannot write the state of the cluster to {state} ({error}): choose another --state"
        ) from error


def _refuse_files(state: Path) -> None:
    """Refuse a folder with files under the names that a cluster uses, which `down` would remove."""
    names = (_RAY, _LOGS, _TEMPORARY, _TOKEN, LIBRARY, f"{_STATE}.new")
    found = [name for name in names if os.path.lexists(state / name)]
    if found:
        raise UserError(
            f"--state {state} holds {found[0]!r}, which no cluster of this program is known to have made: move it away,"
            " or choose another --state"
        )


def _refuse_foreign(state: Path) -> None:
    """Refuse a state folder that another user owns or may write to: they could plant a library or name processes."""
    try:
        link, folder = state.lstat(), state.stat()
    except OSError:
        return  # absent: whoever makes it owns it
    if {link.st_uid, folder.st_uid} != {os.getuid()}:
        raise UserError(f"the state folder {state} belongs to another user: choose another --state")
    if folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"other users may write to the state folder {state}: run `chmod go-w {state}`")


def _write_state(state: Path, cluster: LocalCluster) -> None:
    new = state / f"{_STATE}.new"
    new.write_text(json.dumps(asdict(cluster), indent=1))
    new.replace(state / _STATE)


def _start_nodes(cluster: LocalCluster, options: NodeOptions, state: Path) -> None:
    if not cluster.enter:
        build_library(state)
    for name in (_LOGS, _RAY, _TEMPORARY):  # Ray lets every user read what it writes.
        (state / name).mkdir(mode=0o700)
    server = urlsplit(cluster.address)
    head = f"--head --port={cluster.gcs.rpartition(':')[2]} --include-dashboard=true"
    first = [
        *head.split(),
        f"--dashboard-host={server.hostname}",
        f"--dashboard-port={server.port}",
        f"--ray-client-server-port={free_ports(1)[0]}",
    ]
    with _ray_start(cluster, options, state, 0, first):
        pass
    with contextlib.ExitStack() as others:  # They start at once; the end of the block waits for them.
        for number in range(1, len(cluster.nodes)):
            others.enter_context(_ray_start(cluster, options, state, number, [f"--address={cluster.gcs}"]))


def start_node(cluster: LocalCluster, options: NodeOptions, state: Path, number: int) -> None:
    """Start a node again whose raylet has ended; ``number`` counts from 0, the head, which cannot be started again."""
    with _ray_start(cluster, options, state, number, [f"--address={cluster.gcs}"]):
        pass


@contextlib.contextmanager
def _ray_start(
    cluster: LocalCluster, options: NodeOptions, state: Path, number: int, role: list[str]
) -> Iterator[None]:
    """Start node ``number``; the end of the block waits until it has started."""
    address, log_file = cluster.nodes[number], state / _LOGS / f"node{number}.log"
    environment = _node_environment(cluster, number)
    if not cluster.enter:
        environment = confined(environment, state.resolve() / LIBRARY, address)
    command = [
        *(cluster.enter[number] if cluster.enter else ()),
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        *role,
        f"--node-ip-address={address}",
        # One for each node, as for separate hosts: in a shared folder, an agent that unpacks a job's code replaces the
        # folder in which another node's processes already work.
        f"--temp-dir={state.resolve() / _RAY / str(number)}",
        f"--num-cpus={cluster.cpus_per_node}",
        f"--num-gpus={cluster.gpus_per_node}",
        f"--object-store-memory={options.object_store_mb * 2**20}",
        # Each agent also listens on 127.0.0.1, where only one can have the default port.
        f"--dashboard-agent-listen-port={free_ports(1)[0]}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--disable-usage-stats",
    ]
    with log_file.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and words, no shell
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # A Ctrl-C in the shell that ran `up` must not reach the nodes.
        )
    yield
    try:
        status = process.wait(timeout=_START_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"Ray node {address} did not start in {_START_SECONDS:.0f} s: {_tail(log_file)}") from None
    if status:
        raise UserError(f"Ray node {address} did not start (status {status}): {_tail(log_file)}")


def _node_environment(cluster: LocalCluster, number: int) -> dict[str, str]:
    dashboard_metrics, autoscaler_metrics = free_ports(2)
    environment = {
        **os.environ,
        _MARK: cluster.mark,
        SERVER_VARIABLE: cluster.address,
        # All processes of the node inherit them, also drivers and workers of jobs; no job record holds the token.
        MODE_VARIABLE: "token",
        PATH_VARIABLE: cluster.token_file,
        # Ray's agents, and workers that are killed, leave their temporary files.
        "TMPDIR": str(Path(cluster.token_file).with_name(_TEMPORARY)),
        # Parts of Ray without a given address look for any cluster on this machine.
        "RAY_ADDRESS": cluster.gcs,
        # The jobs' drivers are started as plain `python`.
        "PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath))),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        # Two metrics servers cannot be switched off; only one on a machine can have their default ports.
        "DASHBOARD_METRIC_PORT": str(dashboard_metrics),
        "AUTOSCALER_METRIC_PORT": str(autoscaler_metrics),
    }
    environment.pop(TOKEN_VARIABLE, None)  # Ray would prefer it, and it is another cluster's.
    if cluster.gpus_per_node:
        first = number * cluster.gpus_per_node
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + cluster.gpus_per_node)))
    return environment


def _wait_for_nodes(cluster: LocalCluster) -> None:
    deadline = time.monotonic() + _DASHBOARD_SECONDS
    while missing := sorted(set(cluster.nodes) - set(alive_nodes(cluster))):
        if time.monotonic() > deadline:
            raise UserError(
                f"Ray's dashboard at {cluster.address} did not show the nodes {', '.join(missing)} "
                f"within {_DASHBOARD_SECONDS:.0f} s: is the machine out of memory?"
            )
        time.sleep(0.3)


def _tail(path: Path) -> str:
    # The unindented lines of a traceback tell what happened.
    lines = [line for line in path.read_text(errors="replace").splitlines() if line and not line[0].isspace()]
    return " | ".join(lines[-2:]) or "it wrote no log"
