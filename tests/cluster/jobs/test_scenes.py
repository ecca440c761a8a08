"""Prediction and evaluation as jobs of a real cluster of two Ray nodes, one of which is lost midway."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cluster.cli import main
from cluster.local.nodes import LocalCluster
from pipeline.config import RunConfig
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.sources.synthetic.rasters import write_worldstrat
from tests.cluster.jobs.lost_node import digests, kill_node

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Let this process compute as a task does: the number of threads changes the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(world: World, make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    run_training(make_config(folder, "train.max_steps=1"))
    return str(folder)


def test_the_table_is_that_of_one_process(
    cluster: LocalCluster, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--split", "train", "--panels", "1", "--perturb", "revisits"]
    assert main(["evaluate", run, "--output", "here", *options]) == 0
    here = capsys.readouterr().out
    there = ["evaluate", run, "--output", "there", "--report", "page.html", *options, "--address", cluster.address]
    assert main(there) == 0
    printed = capsys.readouterr().out
    assert digests(tmp_path / "there") == digests(tmp_path / "here")
    assert here.partition("written to")[0] in printed
    assert (tmp_path / "page.html").read_bytes().endswith(b"</html>\n")
    # What is refused without a cluster is refused in the job, once.
    assert main([*there[:2], "--checkpoint", "77", "--address", cluster.address]) == 2
    assert capsys.readouterr().out.count("satfusion: error: ") == 1
    assert main([*there, "--model", "srcnn+pnn"]) == 2
    assert "--model is only for --published-checkpoint" in capsys.readouterr().err


def test_aois_of_a_lost_node_are_fused_again(
    cluster: LocalCluster, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_worldstrat(tmp_path / "source", 16, seed=9, revisits=2, hr_side=80)
    (tmp_path / "source" / "hr_dataset" / names[0] / f"{names[0]}_pan.tiff").write_bytes(b"no raster")
    monkeypatch.chdir(tmp_path)
    arguments = ["predict", run, "--input", "source", "--output"]
    assert main([*arguments, "here"]) == 0
    assert "15 made, 0 kept, 1 skipped" in capsys.readouterr().out
    killed: list[str] = []
    wanted = cluster, cluster.nodes[1], tmp_path / "there", "*.tif", 2, killed
    killer = threading.Thread(target=kill_node, args=wanted)
    killer.start()
    status = main([*arguments, "there", "--address", cluster.address])
    killer.join()
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert any(name.endswith("raylet") for name in killed)
    assert f"{names[0]}: skipped, unreadable" in printed
    assert digests(tmp_path / "there") == digests(tmp_path / "here")
    assert main([*arguments, "there", "--address", cluster.address]) == 0
    assert "0 made, 15 kept, 1 skipped" in capsys.readouterr().out
