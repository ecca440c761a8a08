"""The published zips, packed from a folder, whole or broken in one way."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

# Fields of a central directory entry: offset after its signature, and format.
FIELDS = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<L"), "packed": (20, "<L"), "size": (24, "<L")}


def pack(folder: Path, to: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Pack a folder in the published layout into the published zips in ``to``, and return that."""
    to.mkdir(parents=True, exist_ok=True)
    parts = {
        "hr_dataset.zip": sorted(folder.glob("hr_dataset/**/*")),
        "lr_dataset_l2a.zip": sorted(folder.glob("lr_dataset/*/L2A/**/*")),
        "lr_dataset_l1c.zip": sorted(folder.glob("lr_dataset/*/L1C/**/*")),
    }
    for name, paths in parts.items():
        if paths:
            with zipfile.ZipFile(to / name, "w", method, compresslevel=1) as archive:
                for path in paths:
                    archive.write(path, path.relative_to(folder))
    return to


def find_entry(data: bytes, member: str) -> int:
    """Return where the member's entry of the central directory begins."""
    with_length = len(member).to_bytes(2, "little")
    start = -1
    while True:
        start = data.index(b"PK\1\2", start + 1)
        if data[start + 28 : start + 30] == with_length and data[start + 46 :].startswith(member.encode()):
            return start


def claim(archive: Path, member: str, **fields: int) -> None:
    """Change what the central directory says of a member: flags, method, crc, packed, size."""
    data = bytearray(archive.read_bytes())
    start = find_entry(bytes(data), member)
    for name, value in fields.items():
        offset, form = FIELDS[name]
        struct.pack_into(form, data, start + offset, value)
    archive.write_bytes(data)


def damage(archive: Path, member: str, at: int) -> None:
    """Change the byte ``at`` of a member, counted from its local header."""
    with zipfile.ZipFile(archive) as opened:
        offset = opened.getinfo(member).header_offset
    with archive.open("r+b") as file:
        file.seek(offset + at)
        (byte,) = file.read(1)
        file.seek(offset + at)
        file.write(bytes([byte ^ 0x55]))
