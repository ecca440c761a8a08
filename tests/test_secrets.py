"""A URI with a secret, in any place of the command line: refused before anything is sent, and never repeated."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.jobs.placement import Placement
from cluster.jobs.submit import build_request, build_verb_request, send
from pipeline.config import OutputConfig, RunConfig, load_config
from sharding.errors import UserError
from sharding.run.job import ShardJob
from tests.test_shard_cli import refused

S3 = "s3://AKIAKEY:hush@bucket/x"
HTTP = "http://me:hush@127.0.0.1:9"
SIGNED = "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=hush"


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Something that listens, and that nobody may connect to."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["shard", "--input", "in", "--output", S3], "--output"),
        (["shard", "--input", "in", f"--output={S3}"], "--output"),
        (["shard", "--input", S3, "--output", "out"], "--input"),
        (["shard", "--input", "in", "--output", "out", "--address", HTTP], "--address"),
        (["shard", "--input", "in", "--output", "out", "--workers", S3], "--workers"),
        (["verify", S3], "verify"),
        (["verify", "--deep", SIGNED], "--deep"),
        (["inspect", S3, "--png", "x.png"], "inspect"),
        (["inspect", "out", S3], "out"),
        (["download", "--to", "x", "--mirror", HTTP], "--mirror"),
        (["train", "srcnn_pnn", f"data.uri={S3}"], "data.uri"),
        (["train", "srcnn_pnn", f"output.uri='{S3}'"], "output.uri"),
        (["train", "srcnn_pnn", f"output={S3}"], "output"),
        (["train", S3], "train"),
        (["train", "srcnn_pnn", f"--output.uri={S3}"], "--output.uri"),
        (["evaluate", S3], "evaluate"),
        (["evaluate", "run", "--data", S3], "--data"),
        (["evaluate", "--published-checkpoint", "f", "--output", SIGNED], "--output"),
        (["monitor", "run", S3], "run"),
        (["demo", "--output", S3], "--output"),
        (["demo", f"data.uri={S3}"], "data.uri"),
        (["fly", S3], "fly"),
    ],
)
def test_every_verb_refuses_it(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(rf"{named}'? holds a user name, password or signature", shown.err)
    assert "hush" not in shown.err
    assert "AKIAKEY" not in shown.err


@pytest.mark.parametrize("override", [f"data.uri={S3}", f"output.uri={S3}", f"output.uri={SIGNED}"])
def test_submit_connects_to_nobody(server: socket.socket, override: str) -> None:
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    sentence = refused("submit", "srcnn_pnn", "--address", address, "--workers", "2", override)
    assert f"{override.partition('=')[0]} holds a user name, password or signature" in sentence
    assert "hush" not in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit", "{tmp}/config.toml", "--workers", "2"], "config.toml: output.uri holds"),
        (["submit", "srcnn_pnn", "--workers", "2", "output.uri=s3:/bucket/run"], "'s3:/bucket/run' is no S3 URI"),
        (["shard", "--input", "in", "--output", "s3:/bucket/x"], "'s3:/bucket/x' is no S3 URI"),
        (["shard", "--input", "in", "--output", "gs://bucket/x"], "cannot open 'gs://bucket/x'"),
    ],
)
def test_nor_for_what_a_file_holds_or_a_slash_that_is_missing(
    server: socket.socket, arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text(f'[output]\nuri = "{S3}"\n')
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    assert main([argument.format(tmp=tmp_path) for argument in arguments] + ["--address", address]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert "hush" not in shown


def test_a_value_of_the_wrong_type_is_not_repeated() -> None:
    for values in ({"output": {"uri": [S3]}}, {"data": {"cache_dir": S3}}, {"train": {"precision": S3}}):
        with pytest.raises(UserError, match="holds a user name") as caught:
            RunConfig.from_dict(values)
        assert "hush" not in str(caught.value)


def test_python_callers_are_refused_too() -> None:
    for call in (
        lambda: OutputConfig(uri=S3),
        lambda: load_config("srcnn_pnn", [f"output.uri={S3}"]),
        lambda: send(build_request(load_config("srcnn_pnn"), Placement(2), {}, Path("/")), HTTP),
    ):
        with pytest.raises(UserError, match="holds a user name") as caught:
            call()
        assert "hush" not in str(caught.value)


def test_a_job_takes_the_submitters_home_and_what_may_be_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    request = build_verb_request(ShardJob(Path("in"), "~/out", overwrite=True), {}, Path("/here"))
    job = ShardJob.from_json(request.job.to_json())
    assert job.output == str(tmp_path / "out")
    assert job.input == Path("/here/in")
    assert job.overwrite is True
