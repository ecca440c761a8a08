"""Processes of a sweep on this machine; a small program takes the place of the training."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.sweep.here import cells_here
from pipeline.config import RunConfig

Program = Callable[[str], Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Return a function that sets the lines of Python which each process runs; it returns their folder."""
    python = sys.executable

    def use(lines: str) -> Path:
        script = tmp_path / "cell"
        script.write_text(f"#!{python}\nimport os, pathlib, signal, sys, time\nos.chdir({str(tmp_path)!r})\n{lines}")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        return tmp_path

    return use


def test_ctrl_c_reaches_a_run_only_through_its_parent(program: Program) -> None:
    """A terminal sends it to each process of the group in the foreground."""
    folder = program("pathlib.Path('group').write_text(str(os.getpgrp()))")
    (outcome,) = cells_here(1, "test")([RunConfig()])
    assert outcome.failure == ""
    assert int((folder / "group").read_text()) != os.getpgrp()
