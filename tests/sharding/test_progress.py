from __future__ import annotations

import io
import logging

import pytest

from sharding.progress import progress


def test_lines_tell_done_total_and_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress(4, "training", "step", every_s=0.0) as shown:
        for _ in range(4):
            shown.update(loss=0.25)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 5
    assert messages[0].startswith("training: 1/4 step, ")
    assert "left, loss=0.25" in messages[0]
    assert messages[-1].startswith("training: 4/4 step, ")
    assert "finished in" in messages[-1]


def test_lines_are_rare_and_the_last_always_comes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress(1000, "sharding", "AOI", every_s=600.0) as shown:
        for _ in range(1000):
            shown.update()
    assert [record.getMessage()[:22] for record in caplog.records] == ["sharding: 1000/1000 AO"]


def test_what_was_done_before_counts_as_done_and_not_in_the_rate(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress(9, "work", "unit", initial=4, every_s=0.0) as shown:
        shown.update(0)
        shown.update(-3)
        shown.update(8)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith("work: 4/9 unit, 0 unit/s, ? left")
    assert messages[1].startswith("work: 1/9 unit, 0 unit/s, ? left")
    assert messages[-1].startswith("work: 9/9 unit, ")


def test_a_failure_is_not_called_finished(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError), progress(9, "work", "unit") as shown:  # noqa: PT012
        shown.update(2)
        raise RuntimeError
    assert "work: 2/9 unit" in caplog.text
    assert "stopped after" in caplog.text


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    with progress(2, "sharding", "AOI") as shown:
        shown.update()
        shown.update(loss=1)
    assert "sharding: 100%" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()
