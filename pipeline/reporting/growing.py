"""Growing files of a run on S3, such as metrics.csv: stored whole from time to time, and in parts in between.

A store cannot append to an object. Before a checkpoint the new bytes are stored as a part, so that a process that
resumes at the checkpoint finds every row; the whole file follows when the run ends, and the parts are then deleted.
"""

from __future__ import annotations

import re
from pathlib import Path

from sharding.storage import NotFoundError, Storage

SMALL_FILE = 32 << 10
"""Size up to which the whole file is stored whenever it has doubled, bytes."""
_PART = re.compile(r"[0-9]{15}")
GROWTH = 2
"""Growth since the last upload that is worth another one."""


class GrowingFile:
    """Object of a file that this process appends to; a file that replaces it by a rename is stored whole."""

    def __init__(self, storage: Storage, key: str) -> None:
        """Name the object; its parts have their first byte as their key, below ``<key>.parts/``."""
        self._storage, self._key = storage, key
        self._parts = storage.child(f"{key}.parts")
        self._whole = self._sent = self._inode = 0

    def fetch(self, path: Path) -> None:
        """Write what the store has of the file to ``path``; nothing if it has none."""
        try:
            data = self._storage.read(self._key)
        except NotFoundError:
            return
        for part in self._parts.list():
            # Parts of an earlier process, which were left when the file was stored whole, begin elsewhere.
            if part.key == _part(len(data)):
                data += self._parts.read(part.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def send(self, path: Path, everything: bool, final: bool) -> None:
        """Store what is due of the file.

        Args:
            path: The file.
            everything: True if all bytes are due; else only a small file that has doubled.
            final: True if the whole file is due.
        """
        stat = path.stat()
        size = stat.st_size
        if stat.st_ino != self._inode:
            self._whole = self._sent = 0
            self._inode = stat.st_ino
        if size == (self._whole if final else self._sent):
            return
        if final or not self._whole or GROWTH * self._whole <= size <= SMALL_FILE:
            data = path.read_bytes()
            self._storage.write(self._key, data)
            for part in self._parts.list():
                if _PART.fullmatch(part.key):
                    self._parts.delete(part.key)
            self._whole = self._sent = len(data)
        elif everything:
            with path.open("rb") as file:
                file.seek(self._sent)
                data = file.read(size - self._sent)
            self._parts.write(_part(self._sent), data)
            self._sent += len(data)


def _part(offset: int) -> str:
    return f"{offset:015d}"
