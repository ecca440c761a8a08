"""`satfusion download` as people run it. Its digests are those of 92 GB: all that arrives here is wrong."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.local.processes import free_ports
from sharding.download.worldstrat import WORLDSTRAT, parse_only
from sharding.storage import retries
from tests.in_process import run_here
from tests.sharding.mirror import Fault, Mirror, serving
from tests.test_shard_cli import refused


def test_the_published_table() -> None:
    assert {key: file.name for key, file in WORLDSTRAT.items()} == {
        "hr": "hr_dataset.zip",
        "l2a": "lr_dataset_l2a.zip",
        "l1c": "lr_dataset_l1c.zip",
        "metadata": "metadata.csv",
        "split": "stratified_train_val_test_split.csv",
    }
    assert len({bytes.fromhex(file.sha256) for file in WORLDSTRAT.values()}) == 5
    assert parse_only("l2a, hr") == ("l2a", "hr")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "l2b"), ["unknown file 'l2b'; did you mean 'l2a'?"]),
        (("--only", ""), ["--only '' names an unknown file ''", "known: hr, l1c, l2a, metadata, split"]),
        (("--mirror", "ftp://host/x"), ["--mirror takes http(s)://HOST[:PORT]/FOLDER"]),
        (("--mirror", "https://me:hush@host/x"), ["'--mirror' holds a user name, password or signature"]),
        (("--mirror", "http://host:port"), ["--mirror takes"]),
        (("--to", "{file}/below"), ["--to", "cannot be a folder (Not a directory)"]),
    ],
)
def test_bad_input(arguments: tuple[str, ...], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    given = [argument.format(file=tmp_path / "file") for argument in arguments]
    sentence = refused("download", "--to", tmp_path / "to", *given)
    assert all(word in sentence for word in words), sentence
    assert "hush" not in sentence
    assert not (tmp_path / "to").exists()


def test_an_unreachable_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 1.0)
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    assert main(["download", "--to", str(tmp_path), "--only", "metadata", "--mirror", url]) == 2
    (sentence,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("satfusion: error: "))
    assert "cannot fetch metadata.csv: the connection to the mirror failed (Connection refused), " in sentence
    assert "times in a row; check the network and --mirror, then run the same command again" in sentence
    assert url not in sentence


def test_interrupted_then_continued_by_the_same_command(tmp_path: Path) -> None:
    body = random.Random(3).randbytes(8_000_000)
    arguments = ["download", "--to", str(tmp_path), "--only", "metadata"]
    part = tmp_path / "metadata.csv.part"
    with serving(Mirror({"metadata.csv": body})) as mirror:
        mirror.faults.append(Fault(after=4_000_000, how="stall"))
        command = [sys.executable, "-m", "cluster.cli", *arguments, "--mirror", mirror.url]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 400
        while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 130, errors
        assert "satfusion: interrupted" in errors
        here = part.stat().st_size
        assert part.read_bytes() == body[:here] != b""
        sentence = refused(*arguments, "--mirror", mirror.url)
        assert mirror.ranges_asked() == [None, f"bytes={here}-"]
    assert f"has SHA-256 {hashlib.sha256(body).hexdigest()} instead of 36f72dc4" in sentence
    assert list(tmp_path.iterdir()) == []


def test_files_known_to_be_whole_need_no_server(tmp_path: Path) -> None:
    for key in ("metadata", "split"):
        target = tmp_path / WORLDSTRAT[key].name
        target.write_bytes(b"stands for the published content")
        state = {"sha256": WORLDSTRAT[key].sha256, "size": 32, "mtime_ns": target.stat().st_mtime_ns}
        target.with_name(f"{target.name}.verified").write_text(json.dumps(state))
    nowhere = ("--mirror", "http://127.0.0.1:9")
    ended = run_here("download", "--to", str(tmp_path), "--only", "split,metadata", *nowhere)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("already there, SHA-256 as published") == 2
    assert f"satfusion shard --input {tmp_path}" in ended.stdout
