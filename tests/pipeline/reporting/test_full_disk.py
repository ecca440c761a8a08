"""Events on a disk that is full for a while: rows are lost, which is said; training continues, later rows are read."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary

from pipeline.config import TrainConfig
from pipeline.reporting.alerts import AlertsConfig
from pipeline.reporting.run_folder import RunFolder
from pipeline.reporting.run_logs import RunLogs
from pipeline.reporting.segments import EventFile
from pipeline.reporting.tags import STEP_TAGS
from pipeline.world import World
from tests.command import column


@contextmanager
def full_disk() -> Iterator[None]:
    """Let the operating system refuse every write to files in the block, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def curve(folder: Path, tag: str) -> list[int]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.step for event in events.Scalars(tag)]


@pytest.mark.parametrize("segmented", [False, True])
def test_events_after_a_full_disk_are_in_another_file(segmented: bool, tmp_path: Path) -> None:
    file = EventFile(tmp_path, 1, segmented)
    for step in range(1, 7):
        value = Summary(value=[Summary.Value(tag="a", simple_value=step)])
        if step in (3, 4):
            with full_disk(), pytest.raises(OSError, match="File too large"):
                file.add(step, value)
        else:
            file.add(step, value)
    file.close()
    assert curve(tmp_path, "a") == [1, 2, 5, 6]


def test_training_continues_without_rows_that_the_disk_does_not_take(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(0, 1, torch.device("cpu"))
    run = RunFolder(str(tmp_path), 10)
    logs = RunLogs(run, world, TrainConfig(), 1)
    row = {tag: torch.ones(1, dtype=torch.float64) for tag in STEP_TAGS}
    for step in range(1, 5):
        if step == 2:
            with full_disk():
                logs.write_step(step, 0, row, {})
        else:
            logs.write_step(step, 0, row, {})
    logs.close()
    assert curve(tmp_path / "events" / "rank-0", "train/loss") == [1, 3, 4]
    steps = column(tmp_path, "step")
    assert steps[0] == "1"
    assert steps[-2:] == ["3", "4"]
    assert caplog.text.count("events and metrics are being lost") == 1
    assert "training continues, free the disk" in caplog.text


def test_an_alert_that_the_disk_does_not_take_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(0, 1, torch.device("cpu"))
    logs = RunLogs(RunFolder(str(tmp_path), 10), world, TrainConfig(), 1, AlertsConfig())
    with full_disk():
        logs.alert(1, "psnr is low")
    logs.close()
    assert "step 1: psnr is low" in caplog.text
    assert "events and metrics are being lost" in caplog.text
