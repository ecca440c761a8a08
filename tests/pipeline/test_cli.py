"""Bad input on the real command line: one sentence, status 2, no traceback, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.train import run_training
from pipeline.world import World
from tests.conftest import S3


def satfusion(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command that must be refused, and return its one sentence."""
    ended = satfusion(*arguments, environment=environment)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("satfusion: error: ")]
    assert len(errors) == 1, ended.stderr
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "srcnn_pn"], ["'srcnn_pn'", "did you mean 'srcnn_pnn'"]),
        (["train", "srcnn_pnn", "train.learning_rat=1"], ["train.learning_rat", "'learning_rate'"]),
        (["train", "srcnn_pnn", "model.encoder=srcn"], ["'srcn'", "'srcnn'"]),
        (["train", "srcnn_pnn"], ["data.uri is empty"]),
        (["evaluate", "{tmp}", "--checkpoint", "best"], ["has no checkpoint 'best'", "none yet"]),
        (["train", "{tmp}/binary.toml"], ["binary.toml", "neither a file nor a recipe"]),
        (["monitor", "{tmp}"], ["holds no events/", "run folder"]),
    ],
)
def test_refusals_that_need_no_data(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    sentence = refused(*(argument.format(tmp=tmp_path) for argument in arguments))
    for word in words:
        assert word in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_does_not_divide_is_refused(dataset_uri: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [f"data.uri={dataset_uri}", f"output.uri={run}", "train.global_batch=8", "train.micro_batch=3"]
    assert "train.global_batch = 8 is not divisible by ranks x micro batch = 1 x 3" in refused(
        "train", "demo", *options
    )
    assert not run.exists()


def test_a_run_folder_of_another_model_is_refused(
    world: World, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config(tmp_path / "run", "train.max_steps=1")
    run_training(config)
    before = sorted((tmp_path / "run").rglob("*"))
    (tmp_path / "config.toml").write_text(config.to_toml())
    sentence = refused("train", str(tmp_path / "config.toml"), "model.head=pannet")
    assert "holds a run with another model" in sentence
    assert "output.uri" in sentence
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    sentence = refused("train", "demo", f"data.uri={tmp_path}", f"output.uri={tmp_path / 'run'}")
    assert f"{tmp_path} holds no index.json" in sentence


@pytest.mark.parametrize(
    ("change", "bucket", "words"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "shared", ["AWS_ENDPOINT_URL", "does not answer"]),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret-0123456789"}, "shared", ["AWS_SECRET_ACCESS_KEY"]),
        ({}, "no-such-bucket", ["no-such-bucket", "bucket"]),
    ],
    ids=["unreachable", "wrong key", "missing bucket"],
)
def test_a_store_that_refuses(change: dict[str, str], bucket: str, words: list[str], s3: S3) -> None:
    environment = {**s3.environment, **change}
    sentence = refused("train", "demo", f"data.uri=s3://{bucket}/none", environment=environment)
    for word in words:
        assert word in sentence
    assert environment["AWS_SECRET_ACCESS_KEY"] not in sentence
