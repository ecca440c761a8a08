"""Data from outside is decoded into types or refused in one sentence, and numbers have ranges."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from sharding.errors import UserError
from sharding.files import read_text, regular_file
from sharding.schema import check_range, check_ranges, decode, decode_strictly
from sharding.storage import open_storage


@dataclass(frozen=True)
class Inner:
    depth: Annotated[float, Meta(gt=0, le=10)] = 1.0


@dataclass(frozen=True)
class Outer:
    place: Path
    count: Annotated[int, Meta(ge=1, le=1000)] | None = None
    inner: Inner = field(default_factory=Inner)
    size: Annotated[int, Meta(ge=1000, le=10**6)] = field(default=1000, metadata={"unit": 1000, "metavar": "KB"})

    def __post_init__(self) -> None:
        check_ranges(self, lambda item: f"--{item.name}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"place": "x", "count": 0}', r"count: expected `int` >= 1"),
        ('{"place": "x", "count": 1.5}', r"count: expected `int \| null`, got `float`"),
        ('{"place": "x", "count": "1"}', r"count: expected `int \| null`, got `str`"),
        ('{"place": "x", "inner": {"depth": 1e999}}', "number out of range"),
        ('{"place": "x", "inner": {"depth": NaN}}', "JSON is malformed"),
        ('{"place": 5}', "place: expected Path, and found int"),
        ("{}", "missing required field `place`"),
        ("[" * 100_000, "expected `object`, got `array`"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"place": "x", "inner": {"dpth": 1}}', "unknown key 'dpth'; did you mean 'depth'"),
        ('{"place": "x", "inner": {"depth": 99}}', "inner.depth: expected `float` <= 10"),
    ],
)
def test_a_wrong_table_is_refused_with_the_place(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        decode_strictly(text, Outer, "job.json")
    assert str(caught.value).startswith("job.json ")


def test_a_table_gives_the_dataclass() -> None:
    assert decode_strictly('{"place": "x", "inner": {"depth": 2}}', Outer, "f") == Outer(Path("x"), None, Inner(2))


@given(st.binary(max_size=100))
def test_any_bytes_are_a_value_or_a_value_error(data: bytes) -> None:
    """Any other error, such as one of recursion or of memory, fails."""
    with contextlib.suppress(ValueError):
        value = decode(data, dict[str, int])
        assert {(type(key), type(number)) for key, number in value.items()} <= {(str, int)}


@pytest.mark.parametrize("count", [0, 2**70, math.nan, math.inf, -1])
def test_a_number_out_of_range_is_named_with_the_range(count: float) -> None:
    with pytest.raises(
        UserError, match=rf"^--count {count} is out of range: it must be a whole number from 1 to 1,000$"
    ):
        Outer(Path("x"), count)  # type: ignore[arg-type]


def test_a_range_is_told_in_the_units_of_the_option() -> None:
    with pytest.raises(UserError, match=r"^--size 0\.5 is out of range: it must be a number from 1 to 1,000 KB$"):
        Outer(Path("x"), size=500)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 11])
def test_a_range_without_its_least_number(value: float) -> None:
    with pytest.raises(UserError, match=r"must be a number above 0 and up to 10$"):
        check_ranges(Inner(value), lambda item: item.name)


def test_a_range_of_one_number() -> None:
    check_range("--x", None, 1, 2)
    check_range("--x", 2, 1, 2)
    with pytest.raises(UserError, match=r"^--x \(of 16610 bits\) is out of range"):
        check_range("--x", int("9" * 4000) * 10**1000, 1, 2)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("é\n", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "text")
    assert read_text("--x", tmp_path / "link") == "é\n"
    assert regular_file("--x", tmp_path / "text") == 3
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words in (
        ("pipe", "is a pipe: give a regular file"),
        ("", "is a folder: give a regular file"),
        ("none", "cannot be read .No such file"),
        ("loop", "cannot be read .Too many levels"),
        ("nul\0", "cannot be read .embedded null byte"),
        ("bytes", "cannot be read as text in UTF-8"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            read_text("--x", tmp_path / name)
        assert str(caught.value).startswith("--x ")
    with pytest.raises(UserError, match="'/dev/zero' is a device"):
        read_text("--x", "/dev/zero")


def test_a_text_file_is_not_larger_than_it_may_be(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="has 1099511627776 bytes: give a text file"):
        read_text("--x", tmp_path / "huge")


def test_a_storage_reads_regular_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "index.json")
    storage = open_storage(tmp_path)
    buffer = memoryview(bytearray(8))
    for read in (
        lambda: storage.read("index.json"),
        lambda: storage.read_range("index.json", 0, 8),
        lambda: storage.read_into("index.json", 0, buffer),
        lambda: list(storage.stream("index.json")),
    ):
        with pytest.raises(UserError, match=r"index\.json is a pipe, a device or a socket, which is not read"):
            read()


def test_a_range_reads_alike_whichever_type_its_numbers_have() -> None:
    for high in (10**6, 1e6):
        with pytest.raises(UserError, match=r"from 0\.5 to 1,000,000"):
            check_range("--x", 1e9, 0.5, high)
