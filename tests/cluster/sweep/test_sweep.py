"""Sweeps whose runs are not trained: the plan, what is kept, and the table."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from cluster.cli import main
from cluster.jobs.submit import build_sweep_request
from cluster.sweep.cell import RESULT_FILE, Result, read_result, training_seconds
from cluster.sweep.options import SweepOptions
from cluster.sweep.plan import SweepJob
from cluster.sweep.run import MARK, PAGE, TABLE, Outcome, run_sweep
from models.registry import ENCODERS, HEADS
from pipeline.config import RunConfig
from pipeline.data import ChipDataset
from pipeline.engines.engine import TrainState
from pipeline.reporting.run_folder import CONFIG_FILE
from pipeline.reporting.tags import Averaged, over_ranks
from pipeline.training.checkpoint import Position, save_checkpoint
from sharding.errors import UserError
from sharding.storage import Storage, open_storage

BASELINES: dict[str, dict[str, float | None]] = {"brovey": {"psnr": 19.25, "ssim": None}}

MakeConfig = Callable[..., RunConfig]


class Trained:
    """Runner that records figures in place of a training: PSNR 20 + seed, and a failure where it is told to fail."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.started: list[str] = []
        self.fails = ""

    def __call__(self, cells: Sequence[RunConfig]) -> Iterator[Outcome]:
        for cell in cells:
            self.started.append("/".join(cell.output.uri.rsplit("/", 2)[1:]))
            if self.fails and self.fails in cell.output.uri:
                yield Outcome(cell, "loss is not finite\nat step 3")
                continue
            figures = {"psnr": 20.0 + cell.train.seed, "ssim": None}
            result = Result(cell.to_dict(), self.digest, "test", figures, 1_500_000, 2_000_000_000, 60.0, BASELINES)
            open_storage(cell.output.uri).write(RESULT_FILE, msgspec.json.encode(result))
            yield Outcome(cell, "")


def job(config: RunConfig, seeds: int = 2, heads: Sequence[str] = ("pnn", "pannet")) -> SweepJob:
    return SweepJob(config.to_dict(), SweepOptions(("srcnn",), tuple(heads), seeds))


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path) -> RunConfig:
    return make_config(tmp_path / "sweep", "train.seed=1")


@pytest.fixture
def trained(config: RunConfig) -> Trained:
    return Trained(ChipDataset(config.data.uri, "train", config.data).index.digest)


def test_what_failed_runs_again_and_what_is_done_is_kept(
    config: RunConfig, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained.fails = "pannet/seed-2"
    assert run_sweep(job(config), trained) == 1
    assert trained.started == ["srcnn+pnn/seed-1", "srcnn+pannet/seed-1", "srcnn+pnn/seed-2", "srcnn+pannet/seed-2"]
    page = (tmp_path / "sweep" / PAGE).read_text()
    assert "| srcnn+pnn | 2 | 1.500 | 2.00 | 21.5 ± 0.71 | - | - | - | 60 ± 0 |" in page
    assert "| srcnn+pannet | 1 of 2 | 1.500 | 2.00 | 21 | - | - | - | 60 |" in page
    assert "- [srcnn+pannet/seed-2](srcnn+pannet/seed-2/): failed: loss is not finite at step 3" in page
    trained.fails, trained.started = "", []
    assert run_sweep(job(config), trained) == 0
    assert trained.started == ["srcnn+pannet/seed-2"]
    table = list(csv.DictReader(io.StringIO((tmp_path / "sweep" / TABLE).read_text())))
    assert [(row["head"], row["done"], row["psnr_mean"], row["ssim_mean"]) for row in table] == [
        ("pnn", "2", "21.5", ""),
        ("pannet", "2", "21.5", ""),
        ("", "", "19.25", ""),
    ]
    assert "| brovey | - | 0 | - | 19.25 | - | - | - | - |" in page
    assert float(table[0]["psnr_spread"]) == pytest.approx(0.5**0.5)
    # The same again starts nothing and changes no file.
    trained.started = []
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "sweep").rglob("*.*")}
    capsys.readouterr()
    assert run_sweep(job(config), trained) == 0
    assert trained.started == []
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "sweep").rglob("*.*")} == before
    assert "4 runs, 4 of them done" in capsys.readouterr().out
    # One more seed, and one more head.
    assert run_sweep(job(config, 3, ("pnn", "pannet", "none")), trained) == 0
    assert len(trained.started) == 5


def test_figures_of_another_configuration_are_refused(config: RunConfig, trained: Trained, tmp_path: Path) -> None:
    assert run_sweep(job(config, 1, ["pnn"]), trained) == 0
    # One of a version that had fewer keys is of this configuration.
    file = tmp_path / "sweep/srcnn+pnn/seed-1" / RESULT_FILE
    older = json.loads(file.read_text())
    del older["config"]["alerts"]
    file.write_text(json.dumps(older))
    trained.started = []
    assert (run_sweep(job(config, 1, ["pnn"]), trained), trained.started) == (0, [])
    values = {**config.to_dict(), "train": {**config.to_dict()["train"], "learning_rate": 0.5}}
    with pytest.raises(UserError, match="figures of another configuration"):
        run_sweep(SweepJob(values, SweepOptions(("srcnn",), ("pnn",))), trained)
    file.write_text("[]")
    with pytest.raises(UserError, match=r"sweep.json holds no figures of a sweep"):
        run_sweep(job(config, 1, ["pnn"]), trained)


def place_record(place: Storage, config: RunConfig, digest: str) -> None:
    record = config.to_dict() | {"environment": {"index_digest": digest}}
    place.write(CONFIG_FILE, json.dumps(record).encode())


def place_checkpoint(place: Storage, kind: str, config: RunConfig, digest: str) -> None:
    """Store a complete checkpoint whose tensors nobody reads."""
    save_checkpoint(place, f"{kind}-3", config, Position(3, 0.5, digest, 1), TrainState({}, {}, 3), [])


@pytest.mark.parametrize("what", ["record", "step", "best"])
def test_a_run_that_was_begun_with_another_configuration_is_refused(
    what: str, config: RunConfig, trained: Trained, tmp_path: Path
) -> None:
    """Its figures would be those of two configurations, and a single training may change its rate."""
    (cell,) = job(config, 1, ["pnn"]).cells()
    place = open_storage(cell.output.uri)

    def begin(run: RunConfig, digest: str) -> None:
        place_record(place, run, digest) if what == "record" else place_checkpoint(place, what, run, digest)

    begin(replace(cell, train=replace(cell.train, learning_rate=0.5)), trained.digest)
    with pytest.raises(
        UserError, match=r"srcnn\+pnn/seed-1 holds a training.*train\.learning_rate \(0\.5, now 0\.001\):"
    ):
        run_sweep(job(config, 1, ["pnn"]), trained)
    begin(cell, "0" * 64)
    with pytest.raises(UserError, match=r"holds a training.*dataset \(digest of its index\) \(0000"):
        run_sweep(job(config, 1, ["pnn"]), trained)
    assert trained.started == []
    assert not (tmp_path / "sweep" / MARK).exists()
    begin(cell, trained.digest)
    assert run_sweep(job(config, 1, ["pnn"]), trained) == 0
    assert trained.started == ["srcnn+pnn/seed-1"]


def test_files_of_others_are_never_replaced(config: RunConfig, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / PAGE).write_text("mine")
    with pytest.raises(UserError, match=f"holds '{PAGE}' and no {MARK}"):
        run_sweep(job(config), trained)
    assert (tmp_path / "sweep" / PAGE).read_text() == "mine"
    assert trained.started == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (MARK, b"{}"),
        (MARK, b'{"config": {}, "options": {"heads": ["pnn"]}}'),
        (MARK, b'{"config": {}, "options": {"encoders": ["srcnn"], "heads": ["pnn"]}, "mine": 1}'),
        (MARK, b"\xff" * (2 << 20)),
        (PAGE, b"# Sweep of the kitchen\n"),
        (PAGE, b""),
        (TABLE, b"encoder,weight\n"),
    ],
)
def test_a_file_of_others_with_a_sweeps_name_is_refused_by_name(
    name: str, content: bytes, config: RunConfig, trained: Trained, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    assert run_sweep(job(config, 1, ["pnn"]), trained) == 0
    trained.started = []
    (folder / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in folder.glob("sweep*")}
    with pytest.raises(UserError, match=f"{folder} holds '{name}': no sweep wrote it, and nothing was changed"):
        run_sweep(job(config), trained)
    assert {path.name: path.read_bytes() for path in folder.glob("sweep*")} == before
    assert trained.started == []


def test_a_pipe_in_the_place_of_the_plan_is_not_waited_for(config: RunConfig, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    os.mkfifo(tmp_path / "sweep" / MARK)
    with pytest.raises(UserError, match="is a pipe"):
        run_sweep(job(config), trained)
    assert (tmp_path / "sweep" / MARK).is_fifo()


def test_the_plan_holds_each_pair_once(config: RunConfig) -> None:
    everything = SweepJob(config.to_dict(), SweepOptions(("none", "all", "srcnn"), ("all", "none")))
    pairs = [(cell.model.encoder, cell.model.head) for cell in everything.cells()]
    assert len(pairs) == len(set(pairs)) == (len(ENCODERS) + 1) * (len(HEADS) + 1) - 1
    assert SweepJob.from_json(everything.to_json()) == SweepJob.from_json(everything.to_json())
    assert SweepJob.from_json(everything.to_json()).cells() == everything.cells()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--encoders", "srcn", "--heads", "pnn"], "--encoders = 'srcn' is not known"),
        (["--encoders", ",", "--heads", "pnn"], "--encoders names nothing"),
        (["--encoders", "none", "--heads", "none"], "is no model"),
        (["--encoders", "srcnn", "--heads", "pnn", "--seeds", "0"], "--seeds"),
        (["--encoders", "srcnn", "--heads", "pnn", "model.hidden=3"], "hidden = 3"),
    ],
)
def test_refusals(options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"output.uri={tmp_path}/sweep"
    assert main(["sweep", "srcnn_pnn", f"data.uri={tmp_path}/none", place, *options]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_request_tells_the_nodes_where_the_store_is(config: RunConfig) -> None:
    request = build_sweep_request(job(config), {"AWS_ENDPOINT_URL": "http://store:1", "AWS_SECRET_ACCESS_KEY": "hush"})
    assert request.environment["AWS_ENDPOINT_URL"] == "http://store:1"
    assert "hush" not in str(request)
    assert request.entrypoint == "python -m cluster.sweep.job job.json"


def test_the_time_is_that_of_all_steps() -> None:
    metrics = "step,epoch,time/chips_per_second\n10,0,8\n20,0,4\n22,0,8\n"
    assert training_seconds(metrics, 8) == 10 * 1 + 10 * 2 + 2 * 1
    slow_first = Averaged()
    for seconds in (10, 1, 1, 1, 1):
        slow_first.add({"time/chips_per_second": 8 / torch.tensor([seconds], dtype=torch.float64)})
    rate = over_ranks(slow_first.take())["time/chips_per_second"]
    assert training_seconds(f"step,epoch,time/chips_per_second\n5,0,{rate}\n", 8) == pytest.approx(14)


def test_a_run_without_figures_is_not_done(tmp_path: Path) -> None:
    assert read_result(open_storage(str(tmp_path))) is None
