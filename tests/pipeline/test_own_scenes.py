"""Three sensors that nobody planned for, from their files over two ranks to an evaluation, on the real command line.

Two steps show the path; what a training reaches stands in docs/experiments.md.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.evaluation.baselines import BASELINES, PANSHARPENED
from pipeline.evaluation.result import FUSED
from tests.command import run_command
from tests.sharding.sources.sensors import write_hdf5, write_rgbn, write_two_crs

TOML = """
[model]
encoder = "srcnn"
head = "pnn"
hidden = 8
[train]
epochs = 100
max_steps = 2
global_batch = 2
checkpoint_every = 2
threads_per_rank = 1
[output]
panels = 1
"""


def write(sensor: str, folder: Path) -> None:
    if sensor == "rgbn":
        write_rgbn(folder, 4, side=240)
    elif sensor == "two_crs":
        write_two_crs(folder, [(400, 600), (400, 400), (400, 400), (400, 400)])
    else:
        for number, split in enumerate(("train", "valid", "test")):
            write_hdf5(folder / f"{split}_wv3.h5", 2, seed=number)


def satfusion(*arguments: str) -> str:
    """Run the command, and return what it printed."""
    ended = subprocess.run([sys.executable, "-m", "cluster.cli", *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sensor", "shard", "train", "bands", "ratio"),
    [
        ("rgbn", ["--source", "scenes", "--revisits", "3"], ["model.revisits=3"], 4, "4/1"),
        ("two_crs", ["--source", "scenes", "--revisits", "2"], ["model.revisits=2"], 3, "20/3"),
        (
            "hdf5",
            ["--source", "pancollection"],
            ["model.revisits=3", "data.simulate=sensor", "data.simulated_revisits=3"],
            8,
            "4/1",
        ),
    ],
)
def test_files_become_shards_a_training_and_an_evaluation(
    tmp_path: Path,
    sensor: str,
    shard: list[str],
    train: list[str],
    bands: int,
    ratio: str,
) -> None:
    write(sensor, tmp_path / "in")
    out, run = str(tmp_path / "out"), str(tmp_path / "run")
    said = satfusion("shard", *shard, "--input", str(tmp_path / "in"), "--output", out, "--workers", "1")
    assert f"{ratio} PAN pixels per LR pixel" in said
    assert "all as written" in satfusion("verify", out, "--deep", "--input", str(tmp_path / "in"))
    satfusion("inspect", out, "--png", str(tmp_path / "sheet.png"))
    (tmp_path / "c.toml").write_text(TOML)
    arguments = [str(tmp_path / "c.toml"), f"data.uri={out}", f"output.uri={run}", f"model.bands={bands}", *train]
    assert "2 ranks" in run_command(2, ["train", *arguments]).output
    run_command(2, ["evaluate", run])
    (chips,) = (tmp_path / "run" / "evaluation").glob("*/chips.csv")
    with chips.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {FUSED, *BASELINES, *PANSHARPENED}
    bicubic = [float(row["psnr"]) for row in rows if row["method"] == "bicubic_median"]
    assert min(bicubic) > 15
    assert all(float(row["agreement"]) > 0.5 for row in rows)
    assert list(chips.parent.glob("panel-*.png"))
