"""Files of WorldStrat: in the published folders, or in the published zips, whose members are read in place.

The planner lists them once: a zip's central directory, a folder's entries. The listing is small and can be sent to
other processes, which then read single files without listing again.
"""

from __future__ import annotations

import os
import re
import struct
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from zlib_ng.zlib_ng import crc32

from sharding.errors import Reason, UnusableError, UserError
from sharding.names import climbs

HR_FOLDER, LR_FOLDER = "hr_dataset", "lr_dataset"
MAX_BYTES = 256 << 20
"""Largest size of one file, packed or not: the largest published raster has 9 MB, and a worker holds one in memory."""

# Files that samples use. Published folders hold as many others (angles, cloud probabilities).
_WANTED = re.compile(r".+(_(ps|rgbn|pan)|-[0-9]+-(L2A_data|L1C_data|CLM|SCL|dataMask))\.tiff?|.+-[0-9]+\.metadata")
# Folders that desktops, notebooks and network drives leave among the AOIs; hidden ones are none either.
_NO_AOI = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _UTF8 = 0x1, 0x800


@dataclass(frozen=True, slots=True)
class Member:
    """Place of a file in a zip, from the central directory."""

    offset: int
    """Offset of its local header, bytes."""

    packed: int
    """Packed size in the zip, bytes."""

    method: int
    """Compression method: 0 stored, 8 deflate."""

    crc32: int
    """CRC-32 of the unpacked bytes."""

    flags: int
    """General purpose flags."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source, read in place."""

    name: str
    """File name, without folders."""

    size: int
    """Unpacked size when it was listed, bytes."""

    place: str
    """Folder or zip that holds it; all files of an AOI share one string, since a plan lists 200,000 files."""

    member: Member | None = None
    """Its place in the zip; None for a file in a folder."""

    @property
    def path(self) -> str:
        """Path of the file, or of the zip that holds it."""
        return self.place if self.member else os.path.join(self.place, self.name)

    def check(self) -> None:
        """Refuse a file that must not or cannot be read, by the listing only.

        Raises:
            UnusableError: ``absurd-size``, or ``unreadable`` for encryption or an unsupported compression method.
        """
        largest = max(self.size, self.member.packed if self.member else 0)
        if largest > MAX_BYTES:
            raise UnusableError("absurd-size", f"{self.name} claims {largest} bytes, the most is {MAX_BYTES}")
        if self.member and self.member.flags & _ENCRYPTED:
            raise UnusableError("unreadable", f"{self._where} is encrypted")
        if self.member and self.member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UnusableError("unreadable", f"{self._where} is packed by method {self.member.method}")

    def read(self) -> bytes:
        """Read the whole file. A member of a zip is unpacked in memory, and its size and CRC-32 are checked.

        Raises:
            UnusableError: ``missing-file``, ``unreadable``, ``damaged-member`` or ``absurd-size``.
        """
        self.check()
        try:
            with open(self.path, "rb") as file:
                if self.member is not None:
                    return self._unpacked(self._packed(file, self.member), self.member)
                data = file.read() if os.fstat(file.fileno()).st_size == self.size else b""
        except FileNotFoundError:
            raise UnusableError("missing-file", f"{self.name} is gone since it was listed") from None
        except OSError as error:
            raise UnusableError("unreadable", f"{self.name}: {error.strerror}") from error
        if len(data) != self.size:
            raise UnusableError("unreadable", f"{self.name} has changed since it was listed with {self.size} bytes")
        return data

    def _packed(self, file: BinaryIO, member: Member) -> bytes:
        file.seek(member.offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
            raise UnusableError("damaged-member", f"{self._where} does not begin where the zip's directory says")
        *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        name = file.read(name_length).decode("utf-8" if member.flags & _UTF8 else "cp437", errors="replace")
        if name.rpartition("/")[2] != self.name:
            raise UnusableError("damaged-member", f"{self._where} is called {name!r} where it lies")
        file.seek(extra_length, os.SEEK_CUR)
        packed = file.read(member.packed)
        if len(packed) != member.packed:
            raise UnusableError("damaged-member", f"{self._where} is cut at the end of the zip")
        return packed

    def _unpacked(self, packed: bytes, member: Member) -> bytes:
        data = packed
        if member.method == zipfile.ZIP_DEFLATED:
            try:
                # One byte more than claimed is enough to detect a zip bomb.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, self.size + 1)
            except zlib.error as error:
                raise UnusableError("damaged-member", f"{self._where} cannot be inflated ({error})") from error
        if len(data) != self.size:
            held = "more" if len(data) > self.size else "fewer"
            raise UnusableError("damaged-member", f"{self._where} holds {held} than the {self.size} bytes it claims")
        if crc32(data) != member.crc32:
            raise UnusableError("damaged-member", f"{self._where} fails its CRC-32")
        return data

    @property
    def _where(self) -> str:
        return f"{self.name} in {os.path.basename(self.path)}"


@dataclass(frozen=True)
class Source:
    """Listing of a folder; no file has been read."""

    folder: Path
    """Folder that was listed."""

    level: str
    """Sentinel-2 product of ``lr``: ``l2a`` or ``l1c``."""

    hr: Mapping[str, tuple[SourceFile, ...]]
    """SPOT rasters per AOI."""

    lr: Mapping[str, tuple[SourceFile, ...]]
    """Rasters and metadata of the revisits per AOI."""

    flaws: Mapping[str, tuple[Reason, str]]
    """Reason and finding per AOI that must not be read."""

    strays: tuple[str, ...]
    """Members of zips whose path leads outside, and that belong to no AOI; they are never read."""


@dataclass
class _Listing:
    """Listing of one part of a source, while it is made."""

    files: dict[str, list[SourceFile]] = field(default_factory=lambda: defaultdict(list))
    flaws: dict[str, tuple[Reason, str]] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)


def open_source(folder: Path, level: str) -> Source:
    """List a folder that holds WorldStrat, each part as folders or as the published zip.

    Args:
        folder: Folder with ``hr_dataset/`` or ``hr_dataset.zip``, and ``lr_dataset/`` or ``lr_dataset_<level>.zip``.
        level: Product, ``l2a`` or ``l1c``.

    Raises:
        UserError: If a part is missing or exists twice, a zip is invalid, or there is no AOI.
    """
    places = f"{HR_FOLDER}/<AOI>/ or {HR_FOLDER}.zip, and {LR_FOLDER}/<AOI>/{level.upper()}/ or {LR_FOLDER}_{level}.zip"
    if not folder.is_dir():
        raise UserError(f"--input {folder} is no folder: give the one that holds {places}")
    hr = _list_part(folder, HR_FOLDER, f"{HR_FOLDER}.zip", "")
    lr = _list_part(folder, LR_FOLDER, f"{LR_FOLDER}_{level}.zip", level.upper())
    if hr is None or lr is None or not (hr.files or lr.files or hr.flaws or lr.flaws):
        raise UserError(f"--input {folder} holds no AOI: it must hold {places}")
    names = {*hr.files, *lr.files}
    return Source(
        folder=folder,
        level=level,
        hr={name: tuple(files) for name, files in hr.files.items()},
        lr={name: tuple(files) for name, files in lr.files.items()},
        flaws={**_alike(names), **lr.flaws, **hr.flaws},
        strays=(*hr.strays, *lr.strays),
    )


def _list_part(folder: Path, name: str, archive: str, below: str) -> _Listing | None:
    """List the files of ``<AOI>/<below>`` in folder ``name`` or zip ``archive``; None if neither exists."""
    unpacked, zipped = folder / name, folder / archive
    if zipped.is_file():
        if any((aoi / below).is_dir() for aoi in (unpacked.iterdir() if unpacked.is_dir() else ())):
            raise UserError(f"--input {folder} holds both {name}/ and {archive}: move one of them away")
        return _list_zip(zipped, name, below)
    return _list_folder(unpacked, below) if unpacked.is_dir() else None


def _list_folder(folder: Path, below: str) -> _Listing:
    listing = _Listing()
    for aoi in folder.iterdir():
        if not _is_aoi(aoi.name) or not aoi.is_dir():
            continue
        name = aoi.name.encode("utf-8", "backslashreplace").decode()
        files = listing.files[name]
        if name != aoi.name:
            listing.flaws[name] = ("unsafe-path", "the folder's name is no UTF-8")
        place = str(aoi / below)
        try:
            with os.scandir(place) as entries:
                wanted = [entry for entry in entries if _WANTED.fullmatch(entry.name)]
            files += [SourceFile(entry.name, entry.stat().st_size, place) for entry in wanted if entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            listing.flaws[name] = ("unreadable", f"its folder cannot be listed ({error.strerror})")
    return listing


def _list_zip(path: Path, top: str, below: str) -> _Listing:
    listing = _Listing()
    seen: set[str] = set()
    for info in _directory(path):
        name = info.orig_filename  # `filename` ends at a NUL
        parts = name.split("/")
        if climbs(name.removesuffix("/")):
            aoi = _aoi_of(name, top)
            if aoi is None:
                listing.strays.append(f"{path.name}: {name}")
            else:
                listing.flaws[aoi] = ("unsafe-path", f"{path.name} holds {name!r}, which leaves its folder")
                listing.files[aoi]  # the AOI is listed nevertheless
            continue
        if len(parts) < 3 or parts[0] != top or not _is_aoi(parts[1]):
            continue
        files = listing.files[parts[1]]
        if parts[2:-1] == [below] * bool(below) and _WANTED.fullmatch(parts[-1]):
            if name in seen:
                listing.flaws[parts[1]] = ("listed-twice", f"{path.name} holds {name!r} twice")
            seen.add(name)
            member = Member(info.header_offset, info.compress_size, info.compress_type, info.CRC, info.flag_bits)
            files.append(SourceFile(parts[-1], info.file_size, str(path), member))
    return listing


def _is_aoi(folder: str) -> bool:
    """Return False for the name of a folder that is known to be no AOI."""
    return not folder.startswith(".") and folder not in _NO_AOI


def _directory(path: Path) -> list[zipfile.ZipInfo]:
    """Return a zip's central directory."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise UserError(
            f"{path} is no whole zip ({error}): download it again, as with `satfusion download --to {path.parent}`"
        ) from error


def _aoi_of(name: str, top: str) -> str | None:
    """Return the AOI that an unsafe path names, or None."""
    parts = re.split(r"[/\\]", name)
    after = parts[parts.index(top) + 1 :] if top in parts else []
    return after[0] if len(after) > 1 and after[0] not in ("", ".", "..") else None


def _alike(names: Iterable[str]) -> dict[str, tuple[Reason, str]]:
    """Return a flaw for each AOI whose name equals another one's up to case and the encoding of accents."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        groups[unicodedata.normalize("NFC", name).casefold()].append(name)
    return {
        name: ("listed-twice", f"the source also has {next(other for other in group if other != name)!r}")
        for group in groups.values()
        for name in group
        if len(group) > 1
    }
