"""Options written once: what a field of a dataclass becomes on the command line and in a job's file."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

from sharding.arguments import add_options, check_values, read_options
from sharding.cli import add_verbs, shard_job
from sharding.errors import UserError
from sharding.prepare.options import SampleOptions
from sharding.run.job import ShardJob, ShardOptions
from sharding.run.plan import PlanOptions
from sharding.storage import StorageOptions


@dataclass(frozen=True)
class Inner:
    depth: int = 3
    """How deep, in m. At most 9."""


@dataclass(frozen=True)
class Outer:
    place: Path
    """Where it is."""

    inner: Inner = field(default_factory=Inner)
    """What lies in it."""

    kind: Literal["plain", "fancy"] = "plain"
    """Its look: ``plain``
    or 100% ``fancy``."""

    ratio: float | None = None
    """LR to HR. None takes the usual one."""

    size_bytes: int = field(default=2_000, metadata={"option": "--size", "metavar": "KB", "unit": 1_000})
    """Its size."""

    least: float = 0.0
    """The least."""

    quiet: bool = False
    """Say nothing."""

    def __post_init__(self) -> None:
        check_values(self)


def parser_of(*kinds: type) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    for kind in kinds:
        add_options(parser, kind)
    return parser


def read(*arguments: str) -> Outer:
    return read_options(Outer, vars(parser_of(Outer, Inner).parse_args(arguments)))


def test_a_field_is_an_option() -> None:
    assert read("--place", "x") == Outer(Path("x"))
    given = read(
        *["--place", "x", "--depth", "5", "--kind", "fancy", "--ratio", "2", "--size", "7", "--least", "1", "--quiet"]
    )
    assert given == Outer(Path("x"), Inner(5), "fancy", 2.0, 7_000, 1.0, quiet=True)


def test_its_help_is_the_first_sentence_of_its_docstring() -> None:
    helped = re.sub(r"\s+", " ", parser_of(Outer, Inner).format_help())
    for words in (
        "--place N where it is --kind {plain,fancy} its look: plain or 100% fancy (default: plain)",
        "--ratio N LR to HR --size KB its size (default: 2) --least N the least (default: 0) --quiet say nothing",
        "--depth N how deep, in m (default: 3)",
    ):
        assert words in helped


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "the following arguments are required: --place"),
        ("--place x --depth y", "argument --depth: invalid int value: 'y'"),
        ("--place x --size 1.5", "argument --size: invalid int value: '1.5'"),
    ],
)
def test_argparse_says_what_is_wrong(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(*arguments.split())
    assert words in capsys.readouterr().err


def test_a_choice_is_checked_by_the_dataclass() -> None:
    with pytest.raises(UserError, match=r"^--kind 'loud' is unknown: it may be plain, fancy$"):
        read("--place", "x", "--kind", "loud")


def job_of(*arguments: str) -> ShardJob:
    parser = argparse.ArgumentParser()
    add_verbs(parser.add_subparsers())
    return shard_job(parser.parse_args(["shard", "--input", "in", "--output", "out", *arguments]))


def test_every_field_of_shard_is_an_option_with_help() -> None:
    parser = argparse.ArgumentParser()
    shard = parser.add_subparsers()
    add_verbs(shard)
    helped = {action.dest: action.help for action in shard.choices["shard"]._actions}
    nested = {"options", "storage", "sample", "plan"}
    for kind in (ShardJob, ShardOptions, SampleOptions, PlanOptions, StorageOptions):
        for item in fields(kind):
            assert item.name in nested or helped[item.name]
            assert item.metadata.keys() <= {"option", "metavar", "parse", "unit"}


def test_the_command_line_of_shard_gives_typed_options(tmp_path: Path) -> None:
    assert job_of() == ShardJob(Path("in"), "out")
    (tmp_path / "aois.txt").write_text("a\n\nb\n")
    words = "--level l1c --revisits 4 --max-cloud 5 --native --splits seeded --fractions 0.5,0.3,0.2 --shard-size 2.5 "
    words += f"--part-size 8 --sse AES256 --workers 3 --strict --report r.json --aois {tmp_path / 'aois.txt'}"
    job = job_of(*words.split())
    assert job == ShardJob(
        Path("in"),
        "out",
        ShardOptions(
            SampleOptions(level="l1c", revisits=4, max_cloud=5.0, lr_size=None, hr_size=None),
            PlanOptions(splits="seeded", fractions=(0.5, 0.3, 0.2), shard_bytes=2_500_000),
            aois=("a", "b"),
            strict=True,
        ),
        StorageOptions(part_size=8 << 20, sse="AES256"),
        workers=3,
        report=Path("r.json"),
    )
    assert ShardJob.from_json(job.to_json()) == job


def test_a_job_refuses_a_key_that_is_no_option() -> None:
    text = job_of().to_json().replace('"revisits"', '"revisit"')
    with pytest.raises(UserError, match=r"unknown key 'revisit'; did you mean 'revisits'\?"):
        ShardJob.from_json(text)
    with pytest.raises(UserError, match=r"options\.sample\.hr: invalid enum value 'pan'"):
        ShardJob.from_json(job_of().to_json().replace('"ps"', '"pan"'))


def test_a_job_has_absolute_paths_and_whole_uris() -> None:
    job = job_of("--report", "r.json").with_absolute_paths(Path("/here"))
    assert (job.input, job.output, job.report) == (Path("/here/in"), "/here/out", Path("/here/r.json"))
    job = job_of("--output", "s3://bucket/x").with_absolute_paths(Path("/here"))
    assert (job.output, job.report) == ("s3://bucket/x", None)
    assert job.with_absolute_paths(Path("/there")).input == Path("/here/in")
