"""Runs of a sweep as tasks; Ray's answers are simulated instead of a cluster."""

from __future__ import annotations

import _thread
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from cluster.jobs.notice import Stopped
from cluster.sweep import cell, on_ray
from cluster.sweep import job as driver
from cluster.sweep.options import SweepOptions
from cluster.sweep.plan import SweepJob
from cluster.sweep.run import Outcome
from pipeline.config import OutputConfig, RunConfig
from pipeline.signals import STOPPED_STATUS
from pipeline.training.device_memory import REMEDY
from sharding.errors import UserError
from sharding.storage.lock import JOB_VARIABLE

OPTIONS = SweepOptions(("srcnn",), ("pnn",))


def cells(*uris: str) -> list[RunConfig]:
    return [replace(RunConfig(), output=OutputConfig(uri=uri)) for uri in uris]


class Cluster:
    """Tasks by their run folder; ``rounds`` are what happens while the driver waits: actions that end tasks."""

    def __init__(self) -> None:
        self.ends: dict[str, Any] = {}
        self.cancelled: list[str] = []
        self.rounds: list[Callable[[], None]] = []

    def submit(self, config: dict[str, Any], split: str, job: str) -> str:
        return str(config["output"]["uri"])

    def wait(self, references: Sequence[str], timeout: float | None = None) -> tuple[list[str], list[str]]:
        self.rounds.pop(0)()
        return [one for one in references if one in self.ends], [one for one in references if one not in self.ends]

    def get(self, reference: str) -> Any:
        end = self.ends[reference]
        if isinstance(end, Exception):
            raise end
        return end

    def cancel(self, reference: str) -> None:
        self.cancelled.append(reference)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(ray, "remote", lambda **options: lambda function: SimpleNamespace(remote=cluster.submit))
    for name in ("wait", "get", "cancel"):
        monkeypatch.setattr(ray, name, getattr(cluster, name))
    return cluster


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_sweep_waits_for_its_trainings_and_begins_no_other(cluster: Cluster) -> None:
    def begin() -> None:
        cluster.ends["a"] = True

    def stop() -> None:
        assert cluster.cancelled == list("bcde")
        cluster.ends |= {"c": True, "d": ray.exceptions.TaskCancelledError(), "e": ray.exceptions.TaskCancelledError()}

    def checkpoint() -> None:
        cluster.ends["b"] = False

    cluster.rounds = [begin, sigterm, stop, checkpoint]
    seen: list[Outcome] = []
    with pytest.raises(Stopped):
        seen.extend(on_ray.cells_on_ray(OPTIONS)(cells(*"abcde")))
    assert [(outcome.cell.output.uri, outcome.failure) for outcome in seen] == [("a", ""), ("c", "")]
    assert cluster.rounds == []
    assert cluster.cancelled == list("bcde"), "once"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_task_that_is_cancelled_stops_its_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray interrupts the main thread of its worker."""

    def run(config: object, split: str, stopping: Callable[[], AbstractContextManager[threading.Event]]) -> bool:
        with stopping() as stop:
            _thread.interrupt_main()
            assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):  # an evaluation has no checkpoint, and ends at once
            _thread.interrupt_main()
        return False

    monkeypatch.setattr(cell, "run_cell", run)
    monkeypatch.setattr(on_ray, "configure_logging", lambda: None)
    monkeypatch.setenv(JOB_VARIABLE, "")
    assert not on_ray._run_cell({}, "test", "job")
    assert os.environ[JOB_VARIABLE] == "job"


def test_without_a_stop_each_run_has_an_outcome(cluster: Cluster) -> None:
    cluster.rounds = [lambda: cluster.ends.update({"a": True, "b": ray.exceptions.WorkerCrashedError()})]
    outcomes = [outcome.failure for outcome in on_ray.cells_on_ray(OPTIONS)(cells("a", "b"))]
    assert outcomes == ["", "its process was lost 4 times (WorkerCrashedError), most often for lack of memory"]
    assert cluster.cancelled == []


def test_a_run_without_gpu_memory_has_the_remedy_in_its_outcome(cluster: Cluster) -> None:
    short = torch.OutOfMemoryError("CUDA out of memory.")
    cluster.rounds = [lambda: cluster.ends.update({"a": ray.exceptions.RayTaskError("train", "text", short)})]
    (outcome,) = on_ray.cells_on_ray(OPTIONS)(cells("a"))
    assert outcome.failure == f"it ran out of GPU memory (CUDA out of memory): {REMEDY}"


@pytest.mark.parametrize(("end", "status"), [(Stopped(), STOPPED_STATUS), (UserError("a mistake"), 2)])
def test_the_status_of_the_driver_says_how_it_ended(
    end: Exception, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(job: SweepJob, runner: object) -> int:
        raise end

    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(driver, "run_sweep", run)
    file = tmp_path / "job.json"
    file.write_text(SweepJob(RunConfig().to_dict(), OPTIONS).to_json())
    assert driver.main([str(file)]) == status
