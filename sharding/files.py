"""Files that a user names: only regular files are opened, so that a pipe or a device never blocks or fills memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sharding.errors import UserError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

MOST_TEXT_BYTES = 2**28
"""Largest text file: a list of AOIs, a split file or a configuration takes a fraction of it."""


def regular_file(option: str, path: str | Path) -> int:
    """Return the size of a file in bytes, after a check that it is a regular one; links are followed.

    Args:
        option: What the user calls the file, at the start of the error.
        path: The file.

    Raises:
        UserError: If it does not exist, cannot be read, or is a folder, a pipe, a device or a socket.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{option} {str(path)!r} cannot be read ({reason}): give an existing file") from None
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise UserError(f"{option} {str(path)!r} is {_KINDS.get(kind, 'no file')}: give a regular file")
    return found.st_size


def read_text(option: str, path: str | Path) -> str:
    """Return the content of a text file in UTF-8, without a byte-order mark.

    Raises:
        UserError: Like `regular_file`, and if the file is too large or is not text in UTF-8.
    """
    size = regular_file(option, path)
    if size > MOST_TEXT_BYTES:
        raise UserError(f"{option} {str(path)!r} has {size} bytes: give a text file of {MOST_TEXT_BYTES} or less")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {str(path)!r} cannot be read as text in UTF-8 ({error}): correct the file") from None
