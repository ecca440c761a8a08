"""Bad input on the real command line: one sentence, status 2, no traceback, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from models.published import to_published
from pipeline.config import DataConfig, RunConfig
from pipeline.data import ChipDataset
from pipeline.quality.metrics import image_metrics
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.storage import retries
from tests.command import column
from tests.conftest import S3
from tests.golden import cases
from tests.in_process import run_here


def satfusion(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=500,
    )


def refused(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command that must be refused, and return its one sentence."""
    ended = run_here(*arguments, environment=environment)
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
        (["evaluate"], ["needs the run folder RUN, or --published-checkpoint FILE"]),
        (["evaluate", "{tmp}", "--model", "srcnn+pnn"], ["--model is only for --published-checkpoint"]),
        (["evaluate", "--published-checkpoint", "f.pt", "--data", "{tmp}"], ["needs --model ENCODER+HEAD"]),
        (["evaluate", "{tmp}", "--published-checkpoint", "f.pt"], ["RUN", "exclude each other"]),
        (["monitor", "{tmp}", "--once"], ["no run is in {tmp}", "run folder"]),
    ],
)
def test_refusals_that_need_no_data(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    sentence = refused(*(argument.format(tmp=tmp_path) for argument in arguments))
    for word in words:
        assert word.format(tmp=tmp_path) in sentence
    assert list(tmp_path.iterdir()) == []


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
def test_a_store_that_refuses(
    change: dict[str, str], bucket: str, words: list[str], s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 1.0)
    environment = {**s3.environment, **change}
    sentence = refused("train", "demo", f"data.uri=s3://{bucket}/none", environment=environment)
    for word in words:
        assert word in sentence
    assert environment["AWS_SECRET_ACCESS_KEY"] not in sentence


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file like those of the published training, of SRCNN+PNN at full width with the golden weights."""
    file = tmp_path_factory.mktemp("published") / "srcnn_pnn.ckpt"
    state = {f"backbone.{name}": value for name, value in to_published(cases.golden_model("SRCNN+PNN")).items()}
    torch.save({"epoch": 19, "global_step": 7780, "state_dict": state}, file)
    return file


def test_a_published_checkpoint_is_evaluated(weights: Path, dataset_uri: str, tmp_path: Path) -> None:
    digest = ChipDataset(dataset_uri, "test", DataConfig()).index.digest[:8]
    folder = tmp_path / f"test-srcnn+pnn-srcnn_pnn-sensor-{digest}"
    folder.mkdir()
    for name in ("of-mine.txt", "panel-007.png"):
        (folder / name).touch()
    (folder / "chips.csv").write_text("aoi,chip,agreement\n")  # an evaluation's: so the panel is one's, too
    options = ["--published-checkpoint", str(weights), "--data", dataset_uri, "--output", str(tmp_path)]
    ended = satfusion("evaluate", *options, "--model", "SRCNN+PNN", "--panels", "1", "--simulate", "sensor")
    assert ended.returncode == 0, ended.stderr
    assert "simulated revisits (sensor)" in ended.stdout
    written = {"chips.csv", "aois.csv", "groups.csv", "table.txt", "panel-000.png"}
    assert {path.name for path in folder.iterdir()} == written | {"of-mine.txt"}
    batch = ChipDataset(dataset_uri, "test", DataConfig(simulate="sensor")).evaluation_batch(0)
    with torch.no_grad():
        fused = cases.golden_model("SRCNN+PNN").eval()(batch.lr, batch.pan).fused
    first = column(folder, "mse", "chips.csv")[0]
    assert float(first) == pytest.approx(image_metrics(fused, batch.hr)["mse"].item(), rel=1e-4)


def test_files_that_hold_more_or_less_than_weights_are_refused(dataset_uri: str, weights: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "config": Path("anything")}, tmp_path / "code.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(weights.read_bytes()[:100_000])
    for name, words in (
        ("code.ckpt", "holds no state dict"),
        ("cut.ckpt", "is cut short"),
        ("no.ckpt", "No such file"),
    ):
        options = ["--data", dataset_uri, "--model", "srcnn+pnn", "--output", str(tmp_path / "figures")]
        sentence = refused("evaluate", "--published-checkpoint", str(tmp_path / name), *options)
        assert words in sentence
        assert name in sentence
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("srcnn+panet", ["head = 'panet' is unknown; did you mean 'pannet'"]),
        ("srcnn", ["'srcnn' is not a model: name ENCODER+HEAD"]),
        ("srcnn+pannet", ["does not fit srcnn+pannet", "lacks Sharpening.blockSharp", "it is one of srcnn+pnn"]),
    ],
)
def test_a_published_checkpoint_of_another_model_is_refused(
    model: str, words: list[str], weights: Path, dataset_uri: str, tmp_path: Path
) -> None:
    options = ["--data", dataset_uri, "--output", str(tmp_path / "figures"), "--model", model]
    sentence = refused("evaluate", "--published-checkpoint", str(weights), *options)
    for word in words:
        assert word in sentence
    assert not (tmp_path / "figures").exists()


def test_a_step_without_gpu_memory_is_one_sentence_with_the_remedy(
    world: World, make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*args: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("pipeline.training.loop.fusion_loss", allocate)
    config = tmp_path / "config.toml"
    config.write_text(make_config(tmp_path / "run", "train.max_steps=1").to_toml())
    ended = run_here("train", str(config))
    assert (ended.returncode, "Traceback" in ended.stderr) == (1, False)
    assert ended.stderr.splitlines()[-1] == (
        "satfusion: error: rank 0 ran out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB):"
        " lower train.micro_batch, set train.recompute=true, or lower model.hidden"
    )


def test_other_errors_of_torch_keep_their_traceback(
    world: World, make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(*args: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("pipeline.training.loop.fusion_loss", compute)
    config = tmp_path / "config.toml"
    config.write_text(make_config(tmp_path / "run", "train.max_steps=1").to_toml())
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_here("train", str(config))
