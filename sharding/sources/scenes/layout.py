"""Files of each scene: by the description's patterns, or as it lists them."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import zipfile
import zlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import cast

from sharding.errors import UnusableError, UserError
from sharding.run.splits import natural_key
from sharding.sources.scenes.description import FILE_NAME, Description

DATE = r"[0-9]{4}[-_]?[0-9]{2}[-_]?[0-9]{2}"
_UNREADABLE = (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError)
SAFE = ".safe"
"""End of the name of a product of Sentinel-2, in lower case."""
_PLACEHOLDERS = {"scene": r"[^/]+?", "revisit": r"[^/]+?", "date": DATE}
_Key = tuple[str, str, str]
_TOKENS = re.compile(r"\{(\w+)\}|(\*\*/)|(\*)|(\?)")


@dataclass(frozen=True)
class File:
    """A file of the source."""

    path: Path
    """Its place on this machine."""

    name: str
    """Path below the folder."""

    size: int
    """Size in bytes when it was listed."""

    member: str = ""
    """Its name in the zip at ``path``; empty for a file of its own."""

    @property
    def location(self) -> str | Path:
        """Its place for GDAL, which reads members of a zip without unpacking it."""
        return f"/vsizip/{{{self.path}}}/{self.member}" if self.member else self.path

    @contextlib.contextmanager
    def open(self) -> Iterator[BufferedIOBase]:
        """Open it for reading.

        Raises:
            UnusableError: ``unreadable``, also for an error while it is read.
        """
        try:
            if not self.member:
                with self.path.open("rb") as stream:
                    yield stream
                return
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as member:
                yield cast(BufferedIOBase, member)
        except _UNREADABLE as error:
            raise UnusableError("unreadable", f"{self.name} cannot be read ({error})") from error


@dataclass(frozen=True)
class RevisitFiles:
    """Files of one revisit."""

    image: File
    """The image."""

    mask: File | None
    """Its cloud mask."""

    date: str | None
    """Its day, if the file's name or the description tells it."""


@dataclass(frozen=True)
class FoundScene:
    """Files of one scene."""

    name: str
    """Its name."""

    revisits: tuple[RevisitFiles, ...]
    """Its revisits, in order."""

    pan: File | None
    """Its panchromatic image."""

    target: File | None
    """Its target."""

    pan_date: str | None = None
    """Day of the panchromatic image, if its name tells it."""


def find_scenes(folder: Path, description: Description) -> list[FoundScene]:
    """Return the scenes of a folder in natural order, complete or not.

    Raises:
        UserError: If a pattern is invalid, matches nothing, or matches two files where one is needed.
    """
    if description.scenes:
        return [_listed(folder, description, number) for number in range(len(description.scenes))]
    files = list(walk(folder))
    images = _matches(files, description.revisits.files, "revisits")
    masks = _masks(files, description.masks.files, {_key(match) for _, match in images})
    singles = {kind: _singles(files, getattr(description, kind).files, kind) for kind in ("pan", "target")}
    revisits: dict[str, list[tuple[str, RevisitFiles]]] = {}
    for file, match in images:
        item = RevisitFiles(file, masks.get(_key(match)), as_date(match["date"]))
        revisits.setdefault(match["scene"], []).append((match["date"] + match["revisit"] + file.name, item))
    whole = folder.resolve().name
    if set(revisits) == {""}:  # revisits whose pattern names no scene, such as Sentinel-2's large tiles, are everyone's
        revisits = dict.fromkeys({*singles["pan"], *singles["target"]}, revisits[""])
    names = sorted({*revisits, *singles["pan"], *singles["target"]}, key=natural_key)
    return [
        FoundScene(
            name=name or whole,
            revisits=tuple(item for _, item in sorted(revisits.get(name, []), key=lambda pair: natural_key(pair[0]))),
            pan=singles["pan"].get(name, (None, None))[0],
            target=singles["target"].get(name, (None, None))[0],
            pan_date=singles["pan"].get(name, (None, None))[1],
        )
        for name in names
    ]


def as_date(text: str | None) -> str | None:
    """Return a day as ``YYYY-MM-DD``, None if the text is no day."""
    digits = re.sub(r"[^0-9]", "", text or "")[:8]
    if len(digits) < 8 or not ("01" <= digits[4:6] <= "12" and "01" <= digits[6:8] <= "31"):
        return None
    return f"{digits[:4]}-{digits[4:6]}-{digits[6:8]}"


def walk(folder: Path) -> Iterator[File]:
    """Yield all files below a folder, without hidden ones; a folder of Sentinel-2's, named ``.SAFE``, is one file."""
    for path, folders, names in os.walk(folder):
        products = sorted(name for name in folders if name.lower().endswith(SAFE))
        for place in (Path(path, name) for name in products):
            yield File(place, place.relative_to(folder).as_posix(), place.stat().st_size)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in products)
        for name in sorted(names):
            place = Path(path, name)
            if not name.startswith(".") and place.is_file():
                yield File(place, place.relative_to(folder).as_posix(), place.stat().st_size)


def _matches(files: Sequence[File], patterns: Sequence[str], kind: str) -> list[tuple[File, Mapping[str, str]]]:
    """Return the files that match one of the patterns, with the values of the placeholders, empty if absent."""
    found: list[tuple[File, Mapping[str, str]]] = []
    for pattern in patterns:
        expression = _compiled(pattern, kind)
        mine = [(file, match.groupdict()) for file in files if (match := expression.fullmatch(file.name))]
        if not mine:
            raise UserError(f"{FILE_NAME}: {kind}.files = {pattern!r} matches no file: correct the pattern")
        found += [(file, {name: values.get(name) or "" for name in _PLACEHOLDERS}) for file, values in mine]
    return found


def _key(match: Mapping[str, str]) -> _Key:
    """Return the values by which a mask finds its revisit."""
    return match["scene"], match["revisit"], match["date"]


def _masks(files: Sequence[File], patterns: Sequence[str], images: Container[_Key]) -> dict[_Key, File]:
    """Return the one mask of each revisit that has one."""
    found: dict[_Key, File] = {}
    for file, match in _matches(files, patterns, "masks"):
        other = found.setdefault(_key(match), file)
        if other != file:
            raise UserError(
                f"{FILE_NAME}: masks.files finds both {other.name!r} and {file.name!r} for one revisit: give it the "
                "placeholders {revisit} or {date} of revisits.files"
            )
        if _key(match) not in images:
            raise UserError(
                f"{FILE_NAME}: masks.files finds {file.name!r}, and revisits.files finds no revisit of these "
                "{scene}, {revisit} and {date}: give both patterns the same placeholders, or remove the file"
            )
    return found


def _singles(files: Sequence[File], patterns: Sequence[str], kind: str) -> dict[str, tuple[File, str | None]]:
    """Return the one file of each scene, and its day."""
    found: dict[str, tuple[File, str | None]] = {}
    for file, match in _matches(files, patterns, kind):
        if match["scene"] in found:
            raise UserError(
                f"{FILE_NAME}: {kind}.files finds both {found[match['scene']][0].name!r} and {file.name!r} for scene "
                f"{match['scene']!r}, and one is needed: put {{scene}} into the pattern, or list the files by [[scene]]"
            )
        found[match["scene"]] = file, as_date(match["date"])
    return found


@lru_cache(maxsize=64)
def _compiled(pattern: str, kind: str) -> re.Pattern[str]:
    """Return the expression of a pattern."""
    if pattern.startswith("/") or ".." in PurePosixPath(pattern).parts:
        raise UserError(
            f"{FILE_NAME}: {kind}.files = {pattern!r} leaves the folder of {FILE_NAME}: patterns are paths below it"
        )
    parts, end, seen = [], 0, set[str]()
    for token in _TOKENS.finditer(pattern):
        parts.append(re.escape(pattern[end : token.start()]))
        end = token.end()
        name, deep, star, _ = token.groups()
        if name is not None and name not in _PLACEHOLDERS:
            raise UserError(
                f"{FILE_NAME}: {kind}.files = {pattern!r} has {{{name}}}: known are {{scene}}, {{revisit}} and {{date}}"
            )
        if name is not None:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{_PLACEHOLDERS[name]})")
            seen.add(name)
        else:
            parts.append("(?:[^/]+/)*" if deep else "[^/]*" if star else "[^/]")
    parts.append(re.escape(pattern[end:]))
    return re.compile("".join(parts))


def _listed(folder: Path, description: Description, number: int) -> FoundScene:
    listed = description.scenes[number]
    images = [_file(folder, name, listed.name) for name in _expanded(folder, listed.revisits)]
    masks = [_file(folder, name, listed.name) for name in _expanded(folder, listed.masks)]
    for key, count in (("masks", len(masks)), ("dates", len(listed.dates))):
        if count not in (0, len(images)):
            raise UserError(
                f"{FILE_NAME}: scene {listed.name!r} has {len(images)} revisits and {count} {key}: give one for each, "
                "in the same order"
            )
    revisits = tuple(
        RevisitFiles(image, mask, as_date(date))
        for image, mask, date in itertools.zip_longest(images, masks, listed.dates)
    )
    return FoundScene(
        listed.name, revisits, _file(folder, listed.pan, listed.name), _file(folder, listed.target, listed.name)
    )


def _expanded(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the files of a list, in which a name may be a pattern."""
    found: list[str] = []
    for name in names:
        found += sorted(glob.glob(name, root_dir=folder), key=natural_key) if set("*?[") & set(name) else [name]
    return found


def _file(folder: Path, name: str, scene: str) -> File:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise UserError(f"{FILE_NAME}: scene {scene!r} names {name!r}, which leaves the folder of {FILE_NAME}")
    path = folder / name
    if not (path.is_file() or (path.suffix.lower() == SAFE and path.is_dir())):
        raise UserError(f"{FILE_NAME}: scene {scene!r} names {name!r}, which is no file: correct it")
    return File(path, name, path.stat().st_size)
