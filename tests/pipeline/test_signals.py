"""SIGTERM of a command that ends in good order."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from pipeline import signals
from sharding.storage.retries import GIVE_UP


def test_a_repeated_signal_is_one_request_and_a_later_one_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    with signals.stop_on_sigterm() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
        monkeypatch.setattr(signals, "REPEAT_S", -1.0)
        assert not GIVE_UP.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert GIVE_UP.is_set()
    assert not GIVE_UP.is_set()


def test_ctrl_c_ends_waiting_for_stores() -> None:
    before = signal.getsignal(signal.SIGINT)
    with signals.stop_on_sigterm() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert GIVE_UP.is_set()
        assert not stop.is_set()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_waits_for_no_store(number: signal.Signals) -> None:
    """The command waits for its threads, and these would wait for a store that is away."""
    before = signal.getsignal(signal.SIGINT)
    with signals.sigterm_as_interrupt():
        assert not GIVE_UP.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert GIVE_UP.is_set()
    assert not GIVE_UP.is_set()
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_that_a_shell_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.sigterm_as_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            assert not GIVE_UP.is_set()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_in_a_finaliser_is_raised_after_it(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def command() -> None:
        with signals.sigterm_as_interrupt():
            Interrupted()
            threading.Event().wait(100)

    before = signal.getsignal(number), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt):
        command()
    assert (signal.getsignal(number), sys.unraisablehook) == before
    assert capfd.readouterr().err == ""
