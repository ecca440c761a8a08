"""The Python examples of the pages run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import rasterio

from pipeline.config import RunConfig
from pipeline.training.loop import run_training
from pipeline.world import World

DOCS = Path(__file__).parents[1] / "docs"


def example(page: str) -> str:
    """Return all Python blocks of a page, one after the other."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL))


def run(program: str, folder: Path) -> None:
    script = folder / "example.py"
    script.write_text(program, encoding="utf-8")
    environment = {"PYTHONPATH": str(DOCS.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script)], check=True, env=environment, timeout=500)


def test_a_head_of_your_own(tmp_path: Path) -> None:
    run(example("add-a-model.md"), tmp_path)


def test_arrays_are_fused(world: World, make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_training(make_config(tmp_path / "run", "train.max_steps=1"))
    # The run takes two revisits.
    program = example("predict.md").replace("runs/mine", str(tmp_path / "run")).replace("rand(8,", "rand(2,")
    run(program + "assert image.shape == (3, 500, 500)\n", tmp_path)


@pytest.mark.distributed
def test_the_loader_in_a_loop_of_your_own(dataset_uri: str, tmp_path: Path) -> None:
    program = example("loader.md").replace("s3://bucket/worldstrat", dataset_uri)
    guarded = "\n".join(f"    {line}" for line in program.splitlines())
    run(f"if __name__ == '__main__':\n{guarded}\n", tmp_path)


def commands(page: str) -> str:
    """Return all shell commands of a page, one after the other."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL))


@pytest.mark.slow
@pytest.mark.distributed
def test_the_tutorial_as_a_user_types_it(tmp_path: Path) -> None:
    tools, place = tmp_path / "bin", tmp_path / "place"
    tools.mkdir()
    place.mkdir()
    for name, words in (("satfusion", " -m cluster.cli"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        (tools / name).chmod(0o755)
    (place / "make_scenes.py").write_text(example("tutorial.md"))
    environment = {"PYTHONPATH": str(DOCS.parent), "OMP_NUM_THREADS": "1", "PATH": f"{tools}:/usr/bin:/bin"}
    subprocess.run(["bash", "-euc", commands("tutorial.md")], check=True, cwd=place, env=environment, timeout=1800)
    assert "fused" in (place / "report.html").read_text()
    assert "loss/train" in (place / "scalars.csv").read_text()
    for number in range(6):
        with rasterio.open(place / f"fused/scene{number}.tif") as fused:
            assert (fused.count, fused.shape, fused.profile["tiled"]) == (4, (240, 240), True)
            assert fused.descriptions == ("red", "green", "blue", "nir")
