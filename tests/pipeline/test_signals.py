"""SIGTERM of a command that ends in good order."""

from __future__ import annotations

import os
import signal

import pytest

from pipeline import signals


def test_a_repeated_signal_is_one_request_and_a_later_one_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    with signals.stop_on_sigterm() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
        monkeypatch.setattr(signals, "REPEAT_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
