"""Processes of a sweep on this machine; a small program takes the place of the training."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pipeline.world
from cluster.sweep import cell
from cluster.sweep.here import cells_here
from pipeline.config import RunConfig
from pipeline.signals import STOPPED_STATUS
from pipeline.training import loop
from pipeline.training.device_memory import REMEDY

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


@pytest.mark.parametrize(("stops", "status"), [(True, STOPPED_STATUS), (False, 2)])
def test_sigterm_stops_the_training_at_a_checkpoint(
    stops: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: RunConfig, stop: threading.Event) -> loop.TrainResult:
        if stops:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
        return loop.TrainResult(3, 0.5, stopped=stop.is_set())

    monkeypatch.setattr(loop, "run_training", train)
    monkeypatch.setattr(pipeline.world, "leave_world", lambda: None)  # other tests are in that group
    file = tmp_path / "cell.json"
    config = RunConfig().to_dict() | {"output": {"uri": str(tmp_path / "run")}}
    file.write_text(json.dumps({"config": config, "split": "test"}))
    assert cell.main([str(file)]) == status  # without a stop it evaluates, and there is no checkpoint
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_without_gpu_memory_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: RunConfig, stop: threading.Event) -> loop.TrainResult:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loop, "run_training", train)
    monkeypatch.setattr(pipeline.world, "leave_world", lambda: None)  # other tests are in that group
    file = tmp_path / "cell.json"
    file.write_text(json.dumps({"config": RunConfig().to_dict(), "split": "test"}))
    assert cell.main([str(file)]) == 1
    said = f"satfusion: error: the run ran out of GPU memory (CUDA out of memory): {REMEDY}\n"
    assert capsys.readouterr().err == said


def test_runs_are_told_to_stop_and_waited_for(program: Program) -> None:
    """The second run ends when the first one trains; a sweep that is interrupted then leaves the generator."""
    folder = program(
        """
if os.path.basename(sys.argv[3]) == "cell-0.json":
    while not os.path.exists("trains"):
        time.sleep(0.01)
else:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pathlib.Path("trains").touch()
    signal.sigwait({signal.SIGTERM})
    pathlib.Path("stopped").touch()
"""
    )
    outcomes = cells_here(2, "test")([RunConfig(), RunConfig()])
    assert next(outcomes).failure == ""
    outcomes.close()  # type: ignore[attr-defined] # it is a generator
    assert (folder / "stopped").exists()
