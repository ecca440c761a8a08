"""Sharding as a job of a real cluster of two Ray nodes, one of which is lost midway."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.local import nodes as local
from cluster.local.nodes import LocalCluster
from sharding.sources.synthetic.rasters import write_worldstrat
from tests.cluster.jobs.lost_node import digests, kill_node

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
OPTIONS = ["--revisits", "2", "--shard-size", "2.5"]
"""A sample takes 2.4 MB, so a shard holds one."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_worldstrat(folder, 24, seed=6, revisits=2, hr_side=264)
    return folder


def test_a_lost_node_costs_nothing(
    cluster: LocalCluster,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["shard", "--input", str(source), "--output", str(tmp_path / "here"), "--workers", "1", *OPTIONS]) == 0
    killed: list[str] = []
    killer = threading.Thread(
        target=kill_node, args=(cluster, cluster.nodes[1], tmp_path / "there", "plan-*/*.tar", 4, killed)
    )
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
