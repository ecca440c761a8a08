"""The Python examples of the pages run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
