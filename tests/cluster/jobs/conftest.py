"""A cluster of two Ray nodes for the tests of a module, which may lose one of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import nodes as local
from cluster.local.nodes import LocalCluster, NodeOptions


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with tempfile.TemporaryDirectory(prefix="sf-") as name:  # short enough for Ray's sockets
        yield local.up(NodeOptions(nodes=2, cpus_per_node=1), Path(name, "state"))
        local.down(Path(name, "state"))
