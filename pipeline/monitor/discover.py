"""Runs below folders and prefixes: a folder that holds ``events/`` is a run, and nothing else is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from sharding.errors import UserError
from sharding.names import is_text, path_below
from sharding.storage import LocalStorage, Storage, StorageUnavailableError, open_storage

logger = logging.getLogger(__name__)

EVENTS = "events"
DEEPEST = 4
"""Levels of folders below a named one in which runs are found."""
_LONGEST_NAME = 255
"""Bytes of a folder's name."""


@dataclass(frozen=True)
class Found:
    """A run."""

    name: str
    """Its name, unique: its path below the named folder, or that folder's own name."""
    storage: Storage
    """Its folder."""


class Discovery:
    """The runs below some folders and prefixes; each look finds those that began since."""

    def __init__(self, uris: Sequence[str]) -> None:
        """Name folders and prefixes: runs, places above runs, or places where neither is yet.

        Raises:
            UserError: A URI that no store can have.
        """
        self._roots = [open_storage(uri) for uri in uris]
        self._labels = _names(self._roots)
        self._known: set[str] = set()
        self._refused: set[str] = set()

    @property
    def places(self) -> str:
        """Return the URIs, for messages."""
        return ", ".join(root.uri for root in self._roots)

    def look(self, pool: Executor) -> list[Found]:
        """Return the runs that no earlier look has found, sorted by name.

        Args:
            pool: Threads that list folders at the same time.

        Raises:
            UserError: A store does not answer, or a named place cannot be listed.
        """
        # Pairs of a name, empty for a root itself, and a folder that may be a run or lie above runs.
        level = [("", label, root) for label, root in zip(self._labels, self._roots, strict=True)]
        found = []
        for _ in range(DEEPEST + 1):
            level = [entry for entry in level if entry[2].uri not in self._known]
            below = list(pool.map(self._folders, level))
            following = []
            for (path, label, folder), names in zip(level, below, strict=True):
                if EVENTS in names:
                    found.append(Found(self._name(path, label), folder))
                    continue
                following += [
                    (f"{path}/{name}".lstrip("/"), label, folder.child(name))
                    for name in names
                    if self._is_usable(name, folder)
                ]
            level = following
        # Only now: after an error in another folder they would be known and never returned.
        self._known.update(run.storage.uri for run in found)
        return sorted(found, key=lambda run: run.name)

    def _folders(self, entry: tuple[str, str, Storage]) -> tuple[str, ...]:
        """Return the folders below one; below a named place, one that cannot be listed is shown without them."""
        path, _, folder = entry
        try:
            return folder.folders()
        except StorageUnavailableError:
            raise
        except UserError as error:
            if not path:
                raise
            self._warn(folder.uri, error)
            return ()

    def _warn(self, place: str, error: UserError) -> None:
        """Say once why a place is not shown."""
        if place not in self._refused:
            self._refused.add(place)
            logger.warning("not shown: %s", error)

    def _name(self, path: str, label: str) -> str:
        """Return a run's name: with several named places, below the name of its own."""
        return path if path and len(self._roots) == 1 else f"{label}/{path}".rstrip("/")

    def _is_usable(self, name: str, folder: Storage) -> bool:
        """Return False for a hidden folder, or one whose name cannot be a folder's here; the latter with a warning."""
        if name.startswith("."):
            return False
        try:
            check_name(name, folder.uri)
        except UserError as error:
            self._warn(f"{folder.uri}/{name}", error)
            return False
        return True


def check_name(name: str, place: str) -> None:
    """Refuse a name that cannot be that of a folder of TensorBoard.

    Args:
        name: Name of one folder.
        place: Name of the folder above it in the error.

    Raises:
        UserError: It climbs, or is too long or no Unicode, or holds control characters.
    """
    path_below(Path(), name, place)
    if not is_text(name) or len(name.encode()) > _LONGEST_NAME:
        raise UserError(f"{name!r} in {place} is no UTF-8 or too long: rename it")


def _names(roots: Sequence[Storage]) -> list[str]:
    """Return a name for each root: its last part, numbered if two are equal."""
    names: list[str] = []
    for root in roots:
        place = str(Path(root.uri).resolve()) if isinstance(root, LocalStorage) else root.uri
        base = place.rstrip("/").rsplit("/", 1)[-1] or "run"
        try:
            check_name(base, root.uri)
        except UserError:
            base = "run"
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names
