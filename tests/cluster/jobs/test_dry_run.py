from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from cluster.cli import main
from pipeline.config import RunConfig

COMMAND = ["submit", "srcnn_pnn", "train.global_batch=64", "train.micro_batch=4", "data.uri=shards"]


def test_what_would_be_sent_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:8333")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "HIDDEN")
    assert main([*COMMAND, "--workers", "8", "--gpus-per-worker", "1", "--cpus-per-worker", "2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    request, _, rest = text.partition("\n\n")
    rows = dict(line.split("  ", 1) for line in request.splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["entrypoint"] == "python -m cluster.jobs.train_job job.json"
    assert rows["environment AWS_ENDPOINT_URL"] == "http://127.0.0.1:8333"
    assert rows["batch"] == "64 chips a step = 8 ranks x 2 forward passes x 4 chips"
    assert rows["resources of a rank"] == "2 CPU, 1 GPU"
    assert rows["resources of all"] == "16 CPU, 8 GPU, spread over the nodes, nccl between ranks"
    toml, _, last = rest.rpartition("\n\n")
    assert last == "Nothing was sent.\n"
    config = RunConfig.from_dict(tomllib.loads(toml))
    assert config.data.uri == str(tmp_path / "shards")
    assert "HIDDEN" not in text


def test_what_would_be_refused_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--workers", "7", "--dry-run"]) == 2
    assert "train.global_batch = 64 is not divisible by" in capsys.readouterr().err


def test_an_address_is_needed_to_send(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--workers", "2"]) == 2
    assert "--address is missing" in capsys.readouterr().err
