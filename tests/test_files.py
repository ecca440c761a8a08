"""Pipes where a command expects a file that the user names: refused at once by each verb, instead of waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.in_process import run_here


@pytest.mark.parametrize(
    "arguments",
    [
        ("cluster", "render", "{pipe}", "--to", "{tmp}/to"),
        ("cluster", "render", "{tmp}/deploy.toml", "--to", "{tmp}/to", "--crds", "{tmp}"),
        ("shard", "--source", "scenes", "--input", "{tmp}", "--output", "{tmp}/to"),
        ("train", "{pipe}"),
        ("shard", "--input", "in", "--output", "{tmp}/to", "--aois", "{pipe}"),
        ("shard", "--input", "in", "--output", "{tmp}/to", "--report", "{pipe}"),
        ("evaluate", "run", "--classes", "{pipe}"),
        ("evaluate", "run", "--report", "{pipe}.html"),
        ("evaluate", "--published-checkpoint", "{pipe}", "--model", "srcnn+pnn", "--data", "{dataset}"),
        (
            "predict",
            "--published-checkpoint",
            "{pipe}",
            "--model",
            "srcnn+pnn",
            "--input",
            "{dataset}",
            "--output",
            "{tmp}/to",
        ),
        ("monitor", "run", "--export", "{pipe}.csv"),
        ("inspect", "{dataset}", "--png", "{pipe}.png"),
        ("inspect", "{dataset}", "--html", "{pipe}.html"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]) + f" {arguments[-2]}",
)
def test_a_pipe_is_refused(arguments: tuple[str, ...], small_uri: str, tmp_path: Path) -> None:
    for name in ("pipe", "pipe.html", "pipe.csv", "pipe.png", "scenes.toml", "definition.yaml"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "deploy.toml").write_text(
        'image = "registry.example.org/satfusion:1"\n[run]\noverrides = ["data.uri=s3://b/d", "output.uri=s3://b/r"]\n'
    )
    places = {"tmp": tmp_path, "pipe": tmp_path / "pipe", "dataset": small_uri}
    ended = run_here(*(argument.format(**places) for argument in arguments))
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert " is a pipe: give a regular file" in ended.stderr or " is no regular file: give another name" in ended.stderr
    assert not (tmp_path / "to").exists()
