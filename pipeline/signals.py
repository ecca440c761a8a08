"""Clean shutdown: SIGTERM is handled like Ctrl-C, and children can be made to die with their parent."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on SIGTERM within the block; for the main thread of a command."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
