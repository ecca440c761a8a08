"""The Python examples of the pages run as they stand."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rasterio

from cluster import cli
from pipeline.config import RunConfig, load_config
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.errors import UserError

DOCS = Path(__file__).parents[1] / "docs"
RECIPES = {path.stem for path in (DOCS.parent / "pipeline/recipes").glob("*.toml")}


def example(page: str) -> str:
    """Return all Python blocks of a page, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks, f"{page} has no block of Python"
    return "\n".join(blocks)


def run(program: str, folder: Path) -> None:
    """Run a program, whose own assertions are the test, in a process of its own; it fails with the program."""
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


def written_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield page and words of each ``satfusion`` command in the blocks of README and docs/."""
    for page in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL) + re.findall(r"(?:^    \S.*\n)+", text, re.M)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if "satfusion" in line else []
            if words and words[0] == "satfusion":
                yield page.name, words[1:]


def test_every_written_command_has_verbs_options_and_keys_that_exist() -> None:
    checked = set()
    for page, words in written_commands():
        try:
            args = cli._parse(words)
            if getattr(args, "config", None) in RECIPES:
                load_config(args.config, args.overrides)
        except (SystemExit, UserError) as error:
            pytest.fail(f"{page}: satfusion {' '.join(words)}: {error}")
        checked.add(words[0])
    assert checked >= {"download", "shard", "train", "submit", "sweep", "monitor", "evaluate", "predict", "export"}


def commands(page: str) -> str:
    """Return all shell commands of a page, one after the other."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_the_tutorial_as_a_user_types_it(tmp_path: Path) -> None:
    tools, place = tmp_path / "bin", tmp_path / "place"
    tools.mkdir()
    place.mkdir()
    for name, words in (("satfusion", " -m cluster.cli"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        (tools / name).chmod(0o755)
    (place / "make_scenes.py").write_text(example("tutorial.md"))
    environment = {"PYTHONPATH": str(DOCS.parent), "OMP_NUM_THREADS": "1", "PATH": f"{tools}:/usr/bin:/bin"}
    with subprocess.Popen(
        ["bash", "-euc", commands("tutorial.md")], cwd=place, env=environment, start_new_session=True
    ) as shell:
        try:
            assert shell.wait(3000) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    assert "fused" in (place / "report.html").read_text()
    assert "loss/train" in (place / "scalars.csv").read_text()
    for number in range(6):
        with rasterio.open(place / f"fused/scene{number}.tif") as fused:
            assert (fused.count, fused.shape, fused.profile["tiled"]) == (4, (240, 240), True)
            assert fused.descriptions == ("red", "green", "blue", "nir")
