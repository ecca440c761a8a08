"""Standard output and error of the command: ends of a process whose output nobody can read."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from sharding.errors import UserError
from sharding.terminal import say

BROKEN_PIPE = 141


class OutputError(UserError):
    """Error of a standard output that is closed, or on a device that is full."""


class ReaderGoneError(Exception):
    """End of whoever read the standard output; no `OSError`, which what copies a log takes for a broken connection."""


class _Output(io.FileIO):
    """Descriptor of standard output, whose errors are told to the user."""

    def write(self, data: object) -> int:
        """Write to the descriptor."""
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError:
            raise ReaderGoneError from None
        except OSError as error:
            raise OutputError(f"standard output cannot be written ({error.strerror}): give it another place") from None


def guard_output() -> None:
    """Let writing to standard output raise `OutputError`, where the process has it and nothing has replaced it.

    A stream that the caller has closed gets its descriptor back: the next file that this program opens would have
    its number, and receive what libraries print.
    """
    # In the order of the descriptors, since each takes the lowest that is free.
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # standard output cannot be written, as before
    stream = sys.__stdout__
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Output(1, "w", closefd=False)), encoding="utf-8")
    elif stream is not None and sys.stdout is stream:
        stream.flush()
        raw = _Output(stream.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering or stream.write_through,
        )


def end(status: int, message: str = "") -> int:
    """Print what is not printed yet, and a last message on stderr; return the exit status.

    The readers of the output, such as `head`, may have closed their pipes. Python would report that at its own end, and
    replace the status.
    """
    # In this order: a line that an interruption cut off must not come after the message.
    try:
        if sys.stdout:
            sys.stdout.flush()
    except (BrokenPipeError, ReaderGoneError):
        _discard(sys.stdout)
        status = status or BROKEN_PIPE
    except OutputError as error:
        _discard(sys.stdout)
        status, message = status or 2, message or f"satfusion: error: {error}"
    try:
        if sys.stderr:  # None where the caller has closed it
            if message:
                say(message, sys.stderr)
            sys.stderr.flush()
    except BrokenPipeError:
        _discard(sys.stderr)
        status = status or BROKEN_PIPE
    except OSError:  # a full device: nobody can be told
        _discard(sys.stderr)
    return status


def _discard(stream: TextIO) -> None:
    """Let what the stream still holds go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
