"""Uploads of events and tables of a run on S3: each byte about once, and one continuous curve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary

from benchmarks.events import imitate
from pipeline.config import OutputConfig
from pipeline.monitor.feed import Feed
from pipeline.reporting import segments
from pipeline.reporting.events import CsvLog
from pipeline.reporting.growing import SMALL_FILE
from pipeline.reporting.panels import num_panels
from pipeline.reporting.run_folder import RunFolder
from pipeline.reporting.segments import EventFile, may_close
from sharding.storage import open_storage
from tests.conftest import S3


def curve(folder: Path, tag: str) -> list[int]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    return [event.step for event in events.Scalars(tag)]


def test_a_runs_events_are_uploaded_once_and_read_as_one_curve(s3: S3) -> None:
    uri, steps = s3.prefix(), 400
    done = imitate(uri, steps, 0.5, 1000, OutputConfig(panels=1, sync_seconds=2))
    sent = done.uploads.sent
    assert done.before > 5 * done.written
    assert sent["events"] + sent["images"] < 1.02 * done.written
    assert (
        sum(sent.values()) < 1.4 * done.written
    )  # most of it is the short run's table, which is stored whole at its end
    assert done.delay < 60
    run = open_storage(uri)
    assert len(run.list("events/rank-0/")) == len(run.list("events/aggregate/")) < 80
    for folder in ("rank-0", "aggregate"):
        events = Feed(run.child(f"events/{folder}")).events()
        losses = [event.step for event in events if any(value.tag == "train/loss" for value in event.summary.value)]
        assert losses == list(range(1, steps + 1))


def test_segments_of_a_killed_and_a_resumed_process_are_one_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "WAIT_SHARE", 1e9)  # no event waits long enough by itself
    killed = EventFile(tmp_path, 1, segmented=True)
    for step in range(1, 9):
        killed.add(step, Summary(value=[Summary.Value(tag="a", simple_value=step)]))
        killed.settle(everything=step % 3 == 0)
    resumed = EventFile(tmp_path, 5, segmented=True)
    for step in range(5, 12):
        resumed.add(step, Summary(value=[Summary.Value(tag="a", simple_value=step)]))
        resumed.settle(everything=True)
    resumed.close()
    for path in tmp_path.glob("*.tmp"):  # the killed process's, which it never uploaded
        path.unlink()
    assert len(list(tmp_path.iterdir())) == 2 + 7
    assert curve(tmp_path, "a") == list(range(1, 12))


def test_few_segments_are_closed_and_the_open_one_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "FREE_SEGMENTS", 1)
    file = EventFile(tmp_path, 1, segmented=True)
    for step in range(1, 6):
        file.add(step, Summary(value=[Summary.Value(tag="a", simple_value=step)]))
        file.settle(everything=True)
        names = sorted(path.name.rsplit(".", 1)[1] for path in tmp_path.iterdir() if path.suffix != ".tmp")
        assert names == ["000000", "000001"][: 1 + (step > 1)]
    file.close()
    assert curve(tmp_path, "a") == [1, 2, 3, 4, 5]


def test_a_long_run_has_at_most_500_segments() -> None:
    closed = 0
    for step in range(1, 100_001):
        closed += may_close(closed, step, 1000)
    assert closed < 500
    assert may_close(closed, 100_000, segments.LARGEST_SEGMENT)


def test_a_growing_table_is_stored_in_parts_and_found_again(s3: S3) -> None:
    uri = s3.prefix()
    row = {"step": 0, "text": "x" * 1000}
    run = RunFolder(uri, 60)
    log = CsvLog(run.fetch("metrics.csv"), ["step", "text"], 0)
    for step in range(1, 401):
        log.row(row | {"step": step})
        if step % 20 == 0:
            run.sync()
    parts = run.storage.list("metrics.csv.parts/")
    assert len(run.storage.read("metrics.csv")) <= SMALL_FILE
    assert 1 <= len(parts) <= 20
    # Killed here: another process finds all rows, drops the later ones, and stores the file whole.
    resumed = RunFolder(uri, 60)
    with resumed:
        log = CsvLog(resumed.fetch("metrics.csv"), ["step", "text"], 390)
        log.row(row | {"step": 391})
    lines = resumed.storage.read("metrics.csv").decode().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [str(step) for step in range(1, 392)]
    assert resumed.storage.list("metrics.csv.parts/") == []


def test_panels_are_drawn_after_few_epochs_and_at_the_end() -> None:
    usual, every, none = OutputConfig(panels=2), OutputConfig(panels=2, panels_every=3), OutputConfig(panels=0)
    steps = np.arange(1, 21) * 10

    def drawn(config: OutputConfig) -> list[int]:
        return [int(step) // 10 for step in steps if num_panels(config, int(step), 10, 195 + 5)]

    assert drawn(usual) == [1, 2, 4, 8, 16, 20]
    assert drawn(every) == [3, 6, 9, 12, 15, 18, 20]
    assert drawn(none) == []
