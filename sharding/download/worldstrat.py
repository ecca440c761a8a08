"""Download of the published files of WorldStrat v1.1 (record 15382551 on Zenodo, or a mirror of it)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from sharding.download.fetch import Server, fetch, hash_file, part_path
from sharding.errors import UserError, nearest
from sharding.storage import LocalStorage

ZENODO = "https://zenodo.org/records/15382551/files"


@dataclass(frozen=True)
class Published:
    """One file of the record."""

    name: str
    """File name, on the server and in the folder."""
    sha256: str
    """Digest of its content."""
    gigabytes: int
    """Rounded size, to check free space in advance; 0 for a small table. The server sends the exact size."""


WORLDSTRAT: Mapping[str, Published] = MappingProxyType(
    {
        "metadata": Published("metadata.csv", "36f72dc43290ff79b6722e2654e605a41f32f1a7feb7807f0dbcbc7286214bdb", 0),
        "split": Published(
            "stratified_train_val_test_split.csv",
            "67a38f84fb122627bf8c89de6ca92004af22f30f001aa46fbe1da432c78a9a0b",
            0,
        ),
        "hr": Published("hr_dataset.zip", "7cf08ff4d9bd465f471da8d7f12a536eea78051d87d11fedc75079dc74326d54", 41),
        "l2a": Published("lr_dataset_l2a.zip", "0d35c199fd04618d94a5cc48dcb966d515566e0213fa57e07f8932aa1844f6e6", 25),
        "l1c": Published("lr_dataset_l1c.zip", "a74ef88b04c0ce1b036510f3cd8a8533708d9c915fb5ecbab5869fded17625d3", 26),
    }
)
"""Files of the record by the words of ``--only``, in download order."""
DEFAULT_KEYS = ("metadata", "split", "hr", "l2a")
"""Files that `shard` needs by default."""


def parse_only(text: str) -> tuple[str, ...]:
    """Return the keys of a list such as ``l2a,hr``; UserError for an unknown one."""
    keys = tuple(word.strip() for word in text.split(","))
    for key in keys:
        if key not in WORLDSTRAT:
            raise UserError(f"--only {text!r} names an unknown file {key!r}{nearest(key, WORLDSTRAT)}")
    return keys


def download(
    folder: Path,
    keys: Sequence[str] = DEFAULT_KEYS,
    *,
    mirror: str | None = None,
    published: Mapping[str, Published] = WORLDSTRAT,
    say: Callable[[str], None] = print,
) -> None:
    """Download published files to a folder; resume what an earlier call began.

    A complete file is not downloaded again. Its digest is computed once: ``<name>.verified`` then holds its size and
    modification time, and while these are the same the file is not read again.

    Args:
        folder: Destination; created if it does not exist.
        keys: Words of ``published``.
        mirror: ``http(s)://`` folder that serves the same names, in place of Zenodo.
        published: The files with their digests.
        say: Function that prints a line for the user.

    Raises:
        UserError: A file cannot be downloaded; see `sharding.download.fetch.fetch`.
    """
    server = Server(ZENODO, "Zenodo", "?download=1") if mirror is None else Server(_checked(mirror), "the mirror")
    files = [file for key, file in published.items() if key in keys]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {folder} cannot be a folder ({error.strerror}): give another one") from error
    wanted = [file for file in files if not _verified(folder / file.name, file.sha256)]
    _check_space(folder, wanted)
    for file in files:
        target = folder / file.name
        if file in wanted:
            fetch(server, target, file.sha256)
            LocalStorage(folder).write(*_note(target, file.sha256))
        done = "fetched" if file in wanted else "already there"
        say(f"{file.name}: {target.stat().st_size / 1e6:,.1f} MB, {done}, SHA-256 as published")


def _checked(mirror: str) -> str:
    """Return a mirror's URL without a trailing slash. The error does not repeat it: it may hold a password."""
    try:
        parts = urlsplit(mirror)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and mirror.isascii()
    except ValueError:
        usable = False
    if not usable or any(character in "@?#" or character.isspace() for character in mirror):
        raise UserError("--mirror takes http(s)://HOST[:PORT]/FOLDER, without user, password, query or spaces")
    return mirror.rstrip("/")


def _verified(target: Path, sha256: str) -> bool:
    """Return True if the file is complete; UserError if another file has its name."""
    if not target.exists():
        return False
    notes, (key, state) = LocalStorage(target.parent), _note(target, sha256)
    if notes.exists(key) and notes.read(key) == state:
        return True
    try:
        with target.open("rb") as file:
            digest = hash_file(file, f"reading {target.name}").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {target} ({error.strerror}): check it, or give another --to") from error
    if digest != sha256:
        wrong = f"SHA-256 {digest} instead of {sha256}"
        raise UserError(f"{target} is not the published file ({wrong}): move it away, or give another --to")
    notes.write(key, state)
    return True


def _note(target: Path, sha256: str) -> tuple[str, bytes]:
    """Return key and content of the note that records this digest for a file's present state."""
    stat = target.stat()
    state = {"sha256": sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return f"{target.name}.verified", json.dumps(state).encode()


def _check_space(folder: Path, wanted: Sequence[Published]) -> None:
    """Refuse a folder without space for the bytes still to be downloaded."""
    parts = {file: part_path(folder / file.name) for file in wanted}
    here = {file: part.stat().st_size if part.exists() else 0 for file, part in parts.items()}
    need = sum(max(0, file.gigabytes * 10**9 - here[file]) for file in wanted)
    free = shutil.disk_usage(folder).free
    if need > free:
        missing = f"{free / 1e9:.0f} GB free, and the files need about {need / 1e9:.0f} GB more"
        raise UserError(f"--to {folder} has {missing}: free some space, give another folder, or choose with --only")
