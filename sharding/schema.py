"""Schemas of data from outside: JSON decoded into typed classes by msgspec, and ranges of dataclass fields.

A range stands in a field's type, as ``Annotated[int, msgspec.Meta(ge=1, le=...)]``. `decode` checks it in files, and
`check_ranges` checks it where a dataclass is built from a command line or from TOML.
"""

from __future__ import annotations

import functools
import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

import msgspec

from sharding.errors import UserError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

LARGEST = 2**53
"""Largest count, size or offset: larger integers are not exact in every reader of JSON."""

DEEPEST = 32
"""Levels of lists and tables in JSON that has no schema of its own."""

Natural = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
"""Whole number from 0."""
Positive = Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]
"""Whole number from 1."""
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""Seed of a random generator."""
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
"""SHA-256 in lower-case hex."""


def decode(data: bytes | str, kind: type[T]) -> T:
    """Decode JSON into a type; memory stays in proportion to ``data``.

    Raises:
        ValueError: If it is not JSON of that type; the message has the path of the wrong value.
        UserError: From a dataclass that checks its own values.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ValueError(_explained(error)) from None


def refuse_deep(value: object, deepest: int = DEEPEST) -> None:
    """Refuse JSON that is nested too deeply to be written out again.

    Raises:
        ValueError: If a list or table in ``value`` is nested in ``deepest`` others.
    """
    if isinstance(value, dict | list):
        if deepest == 0:
            raise ValueError("it is nested too deeply")
        for item in value.values() if isinstance(value, dict) else value:
            refuse_deep(item, deepest - 1)


def convert(value: object, kind: type[T]) -> T:
    """Convert plain values, such as those of JSON, to a type; paths may be text.

    Raises:
        ValueError: Like `decode`.
        UserError: Like `decode`.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_path)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ValueError(_explained(error)) from None


def decode_strictly(data: bytes | str, kind: type[T], source: str) -> T:
    """Decode JSON into a dataclass that must know every key.

    Args:
        data: The JSON.
        kind: The dataclass; its fields may be dataclasses.
        source: Name of the file in errors.

    Raises:
        UserError: For an unknown key (the nearest one is named), a wrong type or a value out of range.
    """
    try:
        table = decode(data, dict[str, Any])
        _refuse_unknown(kind, table, source)
        return convert(table, kind)
    except ValueError as error:
        raise UserError(f"{source} is damaged ({error}): send the job again, or write the file again") from None


@dataclass(frozen=True)
class JobFile:
    """Options of a job that are sent to its driver in a file: the base of their dataclasses."""

    def to_json(self) -> str:
        """Return the JSON that `from_json` reads back unchanged; paths are text."""
        return json.dumps(asdict(self), indent=1, default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the JSON of `to_json`.

        Raises:
            UserError: For an unknown key, a wrong type or a value out of range.
        """
        return decode_strictly(text, cls, "the job's file")


def check_range(option: str, value: float | None, low: float, high: float, unit: str = "") -> None:
    """Refuse a number below ``low`` or above ``high``; None passes.

    Raises:
        UserError: For such a number, or one that is not finite; it names the option and the valid range.
    """
    if value is not None and not low <= value <= high:
        whole = isinstance(low, int) and isinstance(high, int)
        words = f"a {'whole ' if whole else ''}number from {_number(low)} to {_number(high)}{unit}"
        raise UserError(f"{option} {_shown(value)} is out of range: it must be {words}")


def check_ranges(options: DataclassInstance, name: Callable[[Field[Any]], str]) -> None:
    """Compare each number of a dataclass with the range in its field's type.

    Args:
        options: The dataclass.
        name: Returns what the user calls a field, with the sign between name and value if there is one.

    Raises:
        UserError: For a number out of range, or not finite; it names the option and the valid range.
    """
    for item, whole, limits in _ranges(type(options)):
        value = getattr(options, item.name)
        if value is None or _within(value, limits):
            continue
        unit = item.metadata.get("unit", 1)
        words = _in_words(whole, limits)
        if unit != 1:
            value, words = value / unit, f"{_in_words(False, limits, unit)} {item.metadata['metavar']}"
        raise UserError(f"{name(item)} {_shown(value)} is out of range: it must be {words}")


@functools.cache
def _ranges(kind: type[DataclassInstance]) -> tuple[tuple[Field[Any], bool, msgspec.Meta], ...]:
    """Return the fields with a range: the field, whether its numbers are whole, and the range."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = []
    for item in fields(kind):
        for part in (hints[item.name], *typing.get_args(hints[item.name])):
            if typing.get_origin(part) is not Annotated:
                continue
            base, *more = typing.get_args(part)
            found += [(item, base is int, limits) for limits in more if isinstance(limits, msgspec.Meta)]
    return tuple((item, whole, limits) for item, whole, limits in found if (limits.ge, limits.gt) != (None, None))


def _within(value: float, limits: msgspec.Meta) -> bool:
    above = value >= limits.ge if limits.ge is not None else limits.gt is not None and value > limits.gt
    return above and math.isfinite(value) and (limits.le is None or value <= limits.le)


def _in_words(whole: bool, limits: msgspec.Meta, unit: float = 1) -> str:
    kind = "a whole number" if whole else "a number"
    low, high = limits.ge if limits.ge is not None else limits.gt, limits.le
    assert low is not None
    assert high is not None
    low, high = (low / unit, high / unit) if unit != 1 else (low, high)
    if limits.ge is None:
        return f"{kind} above {_number(low)} and up to {_number(high)}"
    return f"{kind} from {_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    # By value, not by type: `typing` gives fields with equal ranges, such as 10**6 and 1e6, one and the same range.
    whole = isinstance(value, int) or (value.is_integer() and abs(value) < 10**15)
    return f"{int(value):,}" if whole else f"{value:g}"


def _shown(value: float) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value.bit_length() <= 128 else f"(of {value.bit_length()} bits)"


def _refuse_unknown(kind: Any, table: object, source: str) -> None:
    if not is_dataclass(kind) or not isinstance(table, Mapping):
        return
    hints = typing.get_type_hints(kind)
    for name, value in table.items():
        if name not in hints:
            raise UserError(f"{source} has the unknown key {name!r}{nearest(name, hints)}")
        _refuse_unknown(hints[name], value, source)


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"expected {kind.__name__}, and found {type(value).__name__}")


def _explained(error: BaseException) -> str:
    """Return msgspec's message with the path first: ``splits.train[0].offset: expected `int` >= 0``."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text, _, path = str(error).partition(" - at `")
    text = text[:1].lower() + text[1:] if text[1:2].islower() else text
    path = path.rstrip("`").removeprefix("$").removeprefix(".")
    return f"{path}: {text}" if path else text
