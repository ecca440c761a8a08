"""A sweep on a real cluster of two Ray nodes, one of which is lost midway."""

from __future__ import annotations

import csv
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.local import nodes as local
from cluster.local.nodes import LocalCluster, NodeOptions
from cluster.local.processes import running_with
from cluster.sweep.cell import RESULT_FILE
from pipeline.config import RunConfig

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with tempfile.TemporaryDirectory(prefix="sf-") as name:  # short enough for Ray's sockets
        yield local.up(NodeOptions(nodes=2, cpus_per_node=1), Path(name, "state"))
        local.down(Path(name, "state"))


def lose(cluster: LocalCluster, node: str, sweep: Path, lost: list[int], over: threading.Event) -> None:
    """SIGKILL Ray's processes on a node once a run is done."""
    while not list(sweep.glob(f"*/*/{RESULT_FILE}")):
        if over.wait(0.05):
            return
    option = re.compile(rf"--node[_-]ip[_-]address=?\0?{re.escape(node)}\0".encode())
    for process in running_with("SATFUSION_CLUSTER", cluster.mark):
        if option.search(Path(f"/proc/{process.pid}/cmdline").read_bytes()):
            os.kill(process.pid, signal.SIGKILL)
            lost.append(process.pid)


def test_a_lost_node_costs_no_run_and_the_same_command_does_nothing(
    cluster: LocalCluster,
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "sweep.toml").write_text(make_config(tmp_path / "sweep", "train.max_steps=3").to_toml())
    arguments = ["sweep", str(tmp_path / "sweep.toml"), "--address", cluster.address]
    arguments += ["--encoders", "srcnn", "--heads", "pnn,pannet,none", "--seeds", "2"]
    lost: list[int] = []
    over = threading.Event()
    killer = threading.Thread(target=lose, args=(cluster, cluster.nodes[1], tmp_path / "sweep", lost, over))
    killer.start()
    status = main(arguments)
    over.set()
    killer.join()
    output = capsys.readouterr().out
    assert status == 0, output
    assert lost
    rows = list(csv.DictReader((tmp_path / "sweep/sweep.csv").open()))
    assert [(row["head"], row["runs"], row["done"]) for row in rows] == [
        ("pnn", "2", "2"),
        ("pannet", "2", "2"),
        ("none", "2", "2"),
    ]
    assert all(float(row["psnr_spread"]) > 0 for row in rows)
    began = time.time()
    assert main(arguments) == 0
    assert "6 runs, 6 of them done" in capsys.readouterr().out
    assert all(path.stat().st_mtime < began for path in (tmp_path / "sweep").rglob("*.*") if path.is_file())
