"""Records of TensorBoard's event files: a length, the bytes of one event, and a checksum of each."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import google_crc32c
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

LARGEST_RECORD = 64 << 20
"""Largest record that is read, bytes; ours hold a few scalars or one panel."""
_HEADER, _CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")


class DamagedRecordsError(ValueError):
    """Error of bytes that are not records of events."""


class RecordReader:
    """Reader of records that arrive in pieces."""

    def __init__(self) -> None:
        """Create a reader at the start of a file."""
        self._bytes = bytearray()

    def events(self, piece: bytes) -> Iterator[Event]:
        """Yield the events that are complete with this piece.

        Raises:
            DamagedRecordsError: The bytes are not records.
        """
        self._bytes += piece
        start = 0
        while len(self._bytes) - start >= _HEADER.size:
            length, checksum = _HEADER.unpack_from(self._bytes, start)
            if _masked(bytes(self._bytes[start : start + 8])) != checksum or length > LARGEST_RECORD:
                raise DamagedRecordsError("no event record, or one of more than 64 MiB")
            body = start + _HEADER.size
            stop = body + length + _CHECKSUM.size
            if stop > len(self._bytes):
                break
            data = bytes(self._bytes[body : body + length])
            if _CHECKSUM.unpack_from(self._bytes, body + length) != (_masked(data),):
                raise DamagedRecordsError("an event differs from its checksum")
            try:
                yield Event.FromString(data)
            except DecodeError:
                raise DamagedRecordsError("a record is no event") from None
            start = stop
        del self._bytes[:start]


def as_record(event: Event) -> bytes:
    """Return the bytes of an event's record."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join((length, _CHECKSUM.pack(_masked(length)), data, _CHECKSUM.pack(_masked(data))))


def _masked(data: bytes) -> int:
    """Return TensorBoard's form of a CRC-32C, which may be part of checked data itself."""
    value: int = google_crc32c.value(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF
