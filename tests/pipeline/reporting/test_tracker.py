"""Scalars at W&B and MLflow, by the real packages where they are installed, without a network."""

from __future__ import annotations

import csv
import json
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event

import pytest

from pipeline.config import RunConfig, load_config
from pipeline.reporting import tracker
from pipeline.reporting.tracker import CLIENTS, ID_FILE, Tracker, open_tracker
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.errors import UserError
from sharding.storage import open_storage
from tests.in_process import run_here

MakeConfig = Callable[..., RunConfig]
KEY = "0123456789abcdef0123456789abcdef01234567"


def losses(run: Path) -> dict[int, float]:
    """Return the training loss by step of a run's metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file)}


def test_mlflow_has_the_values_of_the_run_and_its_restart(
    world: World, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.chdir(tmp_path)
    for steps in (2, 3):
        run_training(make_config(tmp_path / "run", "output.tracker=mlflow", f"train.max_steps={steps}"))
    client = mlflow.MlflowClient()
    (experiment,) = (one for one in client.search_experiments() if one.name == "satfusion")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "run" / ID_FILE).read_text())["mlflow"]
    assert (run.info.status, run.info.run_name) == ("FINISHED", str(tmp_path / "run"))
    assert run.data.params["model.encoder"] == "srcnn"
    history = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "train/loss")]
    assert dict(history) == pytest.approx(losses(tmp_path / "run"))
    assert {one.step for one in client.get_metric_history(run.info.run_id, "val/psnr")} == {2, 3}


def test_wandb_has_the_values_of_the_run_and_its_restart(
    world: World,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("API_KEY", KEY)):
        monkeypatch.setenv(f"WANDB_{name}", value)
    for steps in (2, 3):
        run_training(make_config(tmp_path / "run", "output.tracker=wandb", f"train.max_steps={steps}"))
    known = json.loads((tmp_path / "run" / ID_FILE).read_text())["wandb"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{known}.wandb"] * 2
    rows = [row for file in files for row in wandb_history(file)]
    found = {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}
    assert found == pytest.approx(losses(tmp_path / "run"))
    assert {int(row["step"]) for row in rows if "val/psnr" in row} == {2, 3}
    out, err = capfd.readouterr()
    assert KEY not in out + err
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def wandb_history(file: Path) -> list[dict[str, float]]:
    """Return the rows of a run that W&B stored without a network."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in records(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.history.item})
    return rows


def records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, after W&B's header of 7 bytes: blocks of 32 KiB hold parts."""
    place, whole = 7, b""
    while place + 7 <= len(log):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        whole += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield whole
            whole = b""


@pytest.mark.parametrize("name", CLIENTS)
def test_an_absent_package_is_one_sentence(
    name: str, world: World, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = tmp_path / "run.toml"
    config.write_text(make_config(tmp_path / "run").to_toml())
    refused = run_here("train", str(config), f"output.tracker={name}")
    assert refused.returncode == 2
    package = {"wandb": "wandb", "mlflow": "mlflow-skinny"}[name]
    assert f"error: output.tracker = '{name}' needs the package {name}, which is not installed" in refused.stderr
    assert f"`pip install {package}`" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_another_tracker_is_refused() -> None:
    with pytest.raises(UserError, match=r"output.tracker = 'neptune' is not known"):
        load_config("srcnn_pnn", ["output.tracker=neptune"])


def test_a_damaged_file_of_ids_is_named(world: World, tmp_path: Path) -> None:
    (tmp_path / ID_FILE).write_text("[1]")
    config = load_config("srcnn_pnn", ["output.tracker=mlflow"])
    with pytest.raises(UserError, match=rf"{ID_FILE} holds no ids of trackers"):
        open_tracker(config, open_storage(str(tmp_path)), world)


class Breaks:
    """A tracker's run whose server is gone after one row."""

    run_id = "one"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(f"step {step}")
        if step > 1:
            raise ConnectionError(f"https://user:{KEY}@tracker refused")

    def close(self) -> None:
        self.calls.append("closed")


def test_a_tracker_that_fails_stops_no_training_and_tells_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    client = Breaks()
    breaks = Tracker("mlflow", client)
    for step in (1, 2, 3):
        breaks.scalars(step, {"train/loss": 1.0})
    breaks.close()
    assert client.calls == ["step 1", "step 2"]
    breaks.scalars(4, {"train/loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        "no more scalars go to mlflow (ConnectionError); the run folder has all"
    ]


class Hangs(Breaks):
    """A tracker's run whose server takes a row and never answers."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answer = Event(), Event()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.asked.set()
        self.answer.wait()


def test_no_training_waits_for_a_tracker_that_does_not_answer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "_MOST_WAITING", 2)
    monkeypatch.setattr(tracker, "_CLOSE_S", 0.0)
    for rows, why in ((1, "it does not answer"), (4, "it is too slow")):
        client = Hangs()
        stuck = Tracker("wandb", client)
        stuck.scalars(0, {})
        assert client.asked.wait(60)
        for step in range(1, rows):
            stuck.scalars(step, {})
        stuck.close()
        client.answer.set()
        assert caplog.records[-1].getMessage() == f"no more scalars go to wandb ({why}); the run folder has all"
    assert len(caplog.records) == 2


def test_a_restart_goes_on_without_a_tracker_that_is_away(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(config: RunConfig, uri: str, known: str | None) -> Breaks:
        raise ConnectionError(f"https://user:{KEY}@tracker refused")

    monkeypatch.setattr(tracker, "CLIENTS", {"mlflow": ("mlflow-skinny", away)})
    config, run = load_config("srcnn_pnn", ["output.tracker=mlflow"]), open_storage(str(tmp_path))
    with pytest.raises(UserError, match=r"'mlflow' cannot be used \(ConnectionError\): look at MLFLOW_TRACKING_URI"):
        open_tracker(config, run, world)
    run.write(ID_FILE, b'{"mlflow": "one"}')
    assert open_tracker(config, run, world) is None
    assert [record.getMessage() for record in caplog.records] == [
        "no scalars go to mlflow (ConnectionError); the run folder has all"
    ]
