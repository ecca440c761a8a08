"""A real cluster of two Ray nodes, started once for a file of tests, and a watch of the sockets it listens on."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.local import nodes as local
from cluster.local.nodes import LocalCluster, NodeOptions
from cluster.local.objectstore import ObjectStore
from cluster.local.processes import ProcessId, running_with
from tests.listening import listening

MARK = "SATFUSION_CLUSTER"


@dataclass
class Watch:
    """Poll of the sockets that a cluster's processes listen on."""

    cluster: LocalCluster
    seen: set[tuple[str, int]] = field(default_factory=set)
    processes: set[ProcessId] = field(default_factory=set)
    done: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        while not self.done.is_set():
            self.processes |= (now := set(running_with(MARK, self.cluster.mark)))
            self.seen |= listening([process.pid for process in now])
            self.done.wait(0.5)


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """Make a folder with a path short enough for Ray's sockets; pytest's own is too long."""
    with tempfile.TemporaryDirectory(prefix="sf-") as name:
        yield Path(name)


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def state() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder / "state"
        local.down(folder / "state")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """Return an S3 server that is not started yet, whose keys the nodes of the cluster have."""
    store = ObjectStore(tmp_path_factory.mktemp("s3"))
    yield store
    store.stop()


@pytest.fixture(scope="module")
def cluster(state: Path, store: ObjectStore) -> LocalCluster:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, store.environment[name])
        # Ray trusts the stated number of GPUs; each node sees one, whether it exists or not.
        return local.up(NodeOptions(nodes=2, cpus_per_node=1, gpus_per_node=1), state)


@pytest.fixture(scope="module")
def watch(cluster: LocalCluster) -> Iterator[Watch]:
    watch = Watch(cluster)
    thread = threading.Thread(target=watch.look)
    thread.start()
    yield watch
    watch.done.set()
    thread.join()
