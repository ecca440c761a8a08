"""Lines for a terminal or a log: names and messages from outside cannot move the cursor or imitate other lines."""

from __future__ import annotations

import re
from typing import TextIO

# Control characters, line separators, marks that reorder text, and bytes of file names that are no UTF-8.
_STEERING = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    r"""Return a text with its control characters written out, such as ``\x1b``; a line break becomes ``\n``."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(line: str, file: TextIO | None = None) -> None:
    """Print one line for the user, escaped, at once; ``file`` is None for standard output."""
    print(escaped(line), file=file, flush=True)
