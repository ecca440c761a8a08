"""Checks of an index: keys, names, byte ranges and sizes that cannot be, as functions of plain values.

Each raises a `ValueError` that says what is wrong, and where.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from sharding.format.layout import SampleLayout
from sharding.names import climbs, holds_control

ByteRanges = Mapping[str, tuple[int, int]]

NPY_PREAMBLE = 10
"""Bytes of a .npy file of version 1.0 before its header."""
NPY_HEADER = 1 << 16
"""Limit of the header's length."""


def key_of(aoi: str) -> str:
    """Escape an AOI's name for a tar, where a key ends at its first dot and ``/`` would make a folder."""
    return quote(aoi, safe=" ").replace(".", "%2E")


def refuse_name(name: str) -> None:
    """Refuse a shard's name that is no key beside the index, or below one folder there."""
    if climbs(name) or holds_control(name) or name.count("/") > 1:
        raise ValueError(f"the shard name {name!r} is not a file beside the index, or in a folder there")


def refuse_key(key: str, aoi: str) -> None:
    """Refuse a key that is not the escaped name of its AOI."""
    try:
        expected = key_of(aoi)
    except UnicodeEncodeError:
        expected = ""
    if key != expected:
        raise ValueError(f"the key {key!r} is not that of its AOI {aoi!r}")


def refuse_overlap(spans: Sequence[tuple[str, int, int]], limit: int, what: str) -> None:
    """Refuse byte ranges (name, offset, length) that leave ``limit`` bytes or overlap; a repeated one may."""
    end, last = 0, ""
    for name, offset, length in sorted(spans, key=operator.itemgetter(1)):
        if offset + length > limit:
            raise ValueError(f"{what} {name!r} ends at byte {offset + length} of {limit}")
        if offset < end and name != last:
            raise ValueError(f"{what} {name!r} begins at byte {offset}, within {last!r}")
        end, last = max(end, offset + length), name


def refuse_members(members: ByteRanges, layout: SampleLayout, size: int) -> None:
    """Refuse members that are not the arrays of a layout and a JSON, each apart from the others within ``size`` bytes.

    A member may be longer than its array by no more than a .npy header, so arrays are never larger than their file.
    """
    wanted = {f"{name}.npy": array for name, array in layout.items()}
    if members.keys() != {*wanted, "json"}:
        raise ValueError(f"it has {', '.join(members) or 'no members'} where json, {', '.join(sorted(wanted))} belong")
    refuse_overlap([(name, *place) for name, place in members.items()], size, "member")
    for name, array in wanted.items():
        length, values = members[name][1], array.bytes
        if values is not None and not NPY_PREAMBLE < length - values <= NPY_PREAMBLE + NPY_HEADER:
            raise ValueError(f"{name} has {length} bytes, and an array {array} takes {values} and a header")
