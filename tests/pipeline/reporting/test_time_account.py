"""Account of a run's time: what counts, what is lost, what restarts cost; and a record that cannot be read."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.reporting.phases import Phase
from pipeline.reporting.run_folder import RunFolder
from pipeline.reporting.time_account import TIME_FILE, TimeAccount, TimeRecord, read_record
from sharding.storage import open_storage

SPENT: dict[Phase, float] = {"start": 5, "first step": 5, "step": 60, "data": 10, "validation": 15, "store": 2}


def account(before: TimeRecord | None, step: int) -> TimeAccount:
    return TimeAccount(lambda: SPENT, before, step)


def test_time_in_steps_is_a_share_of_all_time() -> None:
    begun = account(None, 0)
    assert begun.seconds() == {"start": 10, "steps": 60, "data": 10, "validation": 15, "checkpoints": 2}
    assert begun.effective == pytest.approx(60 / 97)
    assert begun.summary() == (
        "effective training time 61.9 % of 97 s in 1 starts; the rest: validation 15.5 %, start 10.3 %, data 10.3 %,"
        " checkpoints 2.1 %"
    )


def test_a_process_that_resumes_takes_lost_steps_off_and_counts_the_pause() -> None:
    """Steps 31 to 40 of a killed process are taken again: a quarter of its time in steps did not count."""
    before = TimeRecord(1, 1, 40, 40, time.time() - 100, False, {"start": 10, "steps": 80, "data": 10})
    resumed = account(before, 30)
    seconds = resumed.seconds()
    assert (resumed.lost, seconds["steps"], seconds["lost steps"]) == (10, 60 + 60, 20)
    assert seconds["start"] == 10
    assert seconds["restarts"] == pytest.approx(100 + 10, abs=5)


def test_a_run_that_is_extended_did_not_lose_the_time_between() -> None:
    before = TimeRecord(1, 3, 40, 40, time.time() - 10**6, True, {"steps": 80, "restarts": 7})
    assert account(before, 40).seconds() == {
        "steps": 140, "restarts": 7, "start": 10, "data": 10, "validation": 15, "checkpoints": 2,
    }  # fmt: skip


def test_the_record_is_read_back_and_a_damaged_one_begins_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = open_storage(tmp_path)
    assert read_record(storage) is None
    begun = account(None, 0)
    for step in (1, 2):
        begun.count(step)
    begun.record(RunFolder(str(tmp_path), 10), due=True)
    record = read_record(storage)
    assert record is not None
    assert (record.step, record.counted, record.starts, record.complete) == (2, 2, 1, False)
    assert record.seconds == begun.seconds()
    (tmp_path / TIME_FILE).write_text('{"format_version": 1, "starts": -3}')
    assert read_record(storage) is None
    assert "is not a record of a run's time" in caplog.text
