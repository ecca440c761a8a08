from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys

import pytest

from cluster import __version__, cli
from sharding.errors import UserError


def run_verb(monkeypatch: pytest.MonkeyPatch, verb: object) -> int:
    parser = argparse.ArgumentParser()
    parser.set_defaults(run=verb)
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    return cli.main([])


def test_every_package_offers_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    words = capsys.readouterr().out.split()
    assert {"shard", "inspect", "train", "evaluate", "monitor", "submit", "cluster"} <= set(words)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"satfusion {__version__}\n"


def test_a_users_mistake_is_one_sentence_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(args: argparse.Namespace) -> int:
        raise UserError("the folder x is missing: make it")

    assert run_verb(monkeypatch, verb) == 2
    assert capsys.readouterr().err == "satfusion: error: the folder x is missing: make it\n"


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def verb(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    assert run_verb(monkeypatch, verb) == 130


ENDS = """
import argparse, sys
from cluster import cli
from sharding.errors import UserError

ENDS = {"returns": None, "interrupted": KeyboardInterrupt(), "mistake": UserError("a mistake"), "help": SystemExit(0)}

def verb(args):
    print("a line that waits in the buffer")
    end = ENDS[sys.argv[1]]
    if end is not None:
        raise end
    return 0

def parser():
    parser = argparse.ArgumentParser()
    parser.set_defaults(run=verb)
    return parser

cli.build_parser = parser
sys.exit(cli.main([]))
"""


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("returns", 141, ""),
        ("interrupted", 130, "satfusion: interrupted\n"),
        ("mistake", 2, "satfusion: error: a mistake\n"),
        ("help", 0, ""),
    ],
)
@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_is_gone_changes_neither_status_nor_message(
    end: str, status: int, message: str, both: bool
) -> None:
    """As in `satfusion ... | head -1`, and with `2>&1` before the pipe."""
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", ENDS, end]
    try:
        ended = subprocess.run(
            command, stdout=write, stderr=write if both else subprocess.PIPE, text=True, env=buffered
        )
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr or "") == (status, "" if both else message)


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_output_is_none(closed: str) -> None:
    command = shlex.join([sys.executable, "-c", ENDS, "interrupted"])
    ended = subprocess.run(["/bin/sh", "-c", f"{command} {closed}"], capture_output=True, text=True)
    said = "satfusion: interrupted\n" if closed == ">&-" else ""
    assert (ended.returncode, ended.stderr) == (130, said)


UNWRITABLE = "satfusion: error: standard output cannot be written ({}): give it another place\n"
OUTPUTS = {"> /dev/full": "No space left on device", ">&-": "Bad file descriptor"}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("end", ["returns", "interrupted", "mistake", "help"])
def test_an_output_that_cannot_be_written_is_one_sentence(end: str, output: str, unbuffered: str) -> None:
    command = shlex.join([sys.executable, "-c", ENDS, end])
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(["/bin/sh", "-c", f"{command} {output}"], capture_output=True, text=True, env=environment)
    expected = 2, UNWRITABLE.format(OUTPUTS[output])
    if not unbuffered or output == ">&-":  # the line is written at the end, after what ended the verb
        expected = {
            "interrupted": (130, "satfusion: interrupted\n"),
            "mistake": (2, "satfusion: error: a mistake\n"),
        }.get(end, expected)
    assert (ended.returncode, ended.stderr) == expected


@pytest.mark.parametrize("output", OUTPUTS)
def test_help_that_cannot_be_written_is_no_success(output: str) -> None:
    """Argparse ignores the error, and takes another stream for one that is closed."""
    command = f"{shlex.quote(sys.executable)} -m cluster.cli --help {output}"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    ended = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (2, UNWRITABLE.format(OUTPUTS[output]))


def test_no_file_takes_the_number_of_a_closed_output() -> None:
    """Libraries would print into it."""
    verb = "import os; print(os.open(os.devnull, os.O_RDONLY), file=sys.stderr)"
    script = f"import sys; from cluster.output import guard_output; guard_output(); {verb}"
    closed = f"{shlex.join([sys.executable, '-c', script])} <&- >&-"
    ended = subprocess.run(["/bin/sh", "-c", closed], capture_output=True, text=True, check=True)
    assert int(ended.stderr) > 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "srcnn_pnn", "a.b=1", "c.d=2"],
        ["submit", "srcnn_pnn", "a.b=1", "--address", "http://h:1", "--workers", "2", "c.d=2"],
        ["submit", "--address", "http://h:1", "--workers", "2", "srcnn_pnn", "a.b=1", "c.d=2"],
    ],
)
def test_overrides_may_stand_before_and_after_options(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def verb(args: argparse.Namespace) -> int:
        seen.append(args.overrides)
        return 0

    monkeypatch.setattr(cli, "_submit", verb)
    monkeypatch.setattr("pipeline.cli._train", verb)
    assert cli.main(arguments) == 0
    assert seen == [["a.b=1", "c.d=2"]]


@pytest.mark.parametrize("arguments", [["train", "srcnn_pnn", "--epoch", "3"], ["cluster", "down", "now"], ["fly"], []])
def test_unknown_words_are_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_help_loads_none_of_the_heavy_parts() -> None:
    script = (
        "import sys, cluster.cli; cluster.cli.build_parser(); "
        "print([name for name in ('ray', 'torch', 'rasterio', 'boto3', 'deepspeed') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
