"""Names from outside cannot steer a terminal or imitate a line of a log."""

from __future__ import annotations

import logging

import pytest

from cluster.logs import configure_logging
from sharding.terminal import escaped, say

HARM = "\x1b[2J\x1b]0;x\x07\r\n21:00 INFO all fine \u202e\x9b\udc80"
SHOWN = r"\x1b[2J\x1b]0;x\x07\r\n21:00 INFO all fine \u202e\x9b\udc80"


def test_control_characters_are_written_out_and_text_stays(capsys: pytest.CaptureFixture[str]) -> None:
    assert escaped(HARM) == SHOWN
    assert escaped("Zürich\t東京 'a'") == "Zürich\t東京 'a'"
    say(HARM)
    assert capsys.readouterr().out == SHOWN + "\n"


def test_a_log_has_one_escaped_line_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure_logging()
        logging.getLogger("sharding.x").warning("AOI %s", HARM)
        try:
            raise ValueError(HARM)
        except ValueError:
            logging.getLogger("sharding.x").exception("failed")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    first, *trace = capsys.readouterr().err.splitlines()
    assert first.endswith(f"WARNING AOI {SHOWN}")
    assert len(trace) > 3
    assert "\x1b" not in "".join(trace)
