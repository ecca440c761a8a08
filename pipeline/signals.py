"""Clean shutdown: SIGTERM is handled like Ctrl-C or ends a training, and children can die with their parent."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sharding.storage.retries import GIVE_UP

REPEAT_S = 3.0
"""Seconds after a SIGTERM in which another one is taken for the same."""
_AGAIN_S = 0.01
"""Seconds until an interruption that Python could not raise is raised again."""
_PR_SET_PDEATHSIG = 1
STOPPED_STATUS = 75
"""Exit status of a training that SIGTERM ended at a checkpoint: the same command resumes it (EX_TEMPFAIL)."""
HUNG_STATUS = 76
"""Exit status of a rank whose group made no progress: the same command resumes at the newest checkpoint."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on SIGTERM within the block as on Ctrl-C; for the main thread of a command.

    After either no thread waits for a store any longer, since the interrupted work waits for its threads. Where Python
    can only report an interruption and goes on, in a finaliser or a callback of a weak reference, it is raised again a
    moment later.
    """

    def interrupt(number: int, frame: object) -> None:
        GIVE_UP.set()
        raise KeyboardInterrupt

    def report(unraised: sys.UnraisableHookArgs) -> None:
        if unraised.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            hook(unraised)

    numbers = [signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in a shell's background ignores it
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    hook, sys.unraisablehook = sys.unraisablehook, report
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        GIVE_UP.clear()


@contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """Set an event at the first SIGTERM within the block; a later one, or Ctrl-C, raises `KeyboardInterrupt`.

    After that no thread waits for a store any longer, since the interrupted work waits for its threads. For the main
    thread of a command whose work ends in good order once the event is set. Signals within REPEAT_S of the first are
    the same request: torchrun repeats to its processes what a scheduler has sent to all of them.
    """
    stop = threading.Event()
    asked = 0.0

    def interrupt(number: int, frame: object) -> None:
        GIVE_UP.set()
        raise KeyboardInterrupt

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if not stop.is_set():
            asked = time.monotonic()
            stop.set()
        elif time.monotonic() - asked > REPEAT_S:
            interrupt(number, frame)

    before = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGTERM, ask), (signal.SIGINT, interrupt))
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        GIVE_UP.clear()


def dies_with_parent() -> Callable[[], None] | None:
    """Return a ``preexec_fn`` after which the kernel kills the child when its parent thread ends.

    It covers a parent that is killed and so never reaches its own clean-up. Return None if the system has no such call.
    Start the child from a thread that outlives it: the signal follows the thread, not the process.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # Loaded here, not between fork and exec, where another thread may hold a lock.

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return ask_kernel
