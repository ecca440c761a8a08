"""Sharding as a job of a real cluster of two Ray nodes, one of which is lost midway."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.local import nodes as local
from cluster.local.nodes import LocalCluster, NodeOptions
from cluster.local.processes import running_with
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
OPTIONS = ["--revisits", "2", "--shard-size", "2.5"]
"""A sample takes 2.4 MB, so a shard holds one."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with tempfile.TemporaryDirectory(prefix="sf-") as name:  # short enough for Ray's sockets
        yield local.up(NodeOptions(nodes=2, cpus_per_node=1), Path(name, "state"))
        local.down(Path(name, "state"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_worldstrat(folder, 24, seed=6, revisits=2, hr_side=264)
    return folder


def digests(folder: Path) -> dict[str, str]:
    storage = open_storage(folder)
    return {item.key: hashlib.sha256(storage.read(item.key)).hexdigest() for item in storage.list()}


def kill_node(cluster: LocalCluster, node: str, folder: Path, shards: int, killed: list[str]) -> None:
    """SIGKILL Ray's processes on a node once so many shards exist."""
    deadline = time.monotonic() + 400
    while len(list(folder.glob("plan-*/*.tar"))) < shards:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    option = re.compile(rf"--node[_-]ip[_-]address=?\0?{re.escape(node)}\0".encode())
    for process in running_with("SATFUSION_CLUSTER", cluster.mark):
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        if option.search(command):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(command.split(b"\0")[0].decode())


def test_a_lost_node_costs_nothing(
    cluster: LocalCluster,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["shard", "--input", str(source), "--output", str(tmp_path / "here"), "--workers", "1", *OPTIONS]) == 0
    killed: list[str] = []
    killer = threading.Thread(target=kill_node, args=(cluster, cluster.nodes[1], tmp_path / "there", 4, killed))
    killer.start()
    monkeypatch.chdir(tmp_path)
    arguments = ["shard", "--input", str(source), "--output", "there", "--address", cluster.address, *OPTIONS]
    status = main(arguments)
    killer.join()
    output = capsys.readouterr().out
    assert status == 0, output
    assert digests(tmp_path / "there") == digests(tmp_path / "here")
    assert any(name.endswith("raylet") for name in killed)
    deadline = time.monotonic() + 400
    while local.alive_nodes(cluster) != [cluster.nodes[0]]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    # Refused options are refused like without a cluster: here, and in the job.
    assert main([*arguments, "--hr", "pan"]) == 2
    assert "--hr 'pan' is unknown" in capsys.readouterr().err
    assert main([*arguments[:2], str(tmp_path / "none"), *arguments[3:]]) == 2
    assert capsys.readouterr().out.count("satfusion: error: --input") == 1
