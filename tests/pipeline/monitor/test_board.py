"""Boards of runs that the real writers wrote: what TensorBoard reads from them."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from pipeline.config import RunConfig
from pipeline.monitor import board as board_module
from pipeline.monitor.board import TRACE_SUFFIX, Board, start
from pipeline.monitor.facts import Facts, read_facts
from pipeline.monitor.records import RecordReader
from pipeline.monitor.serve import Watch
from pipeline.reporting.events import AGGREGATE
from pipeline.reporting.segments import EventFile
from pipeline.reporting.tags import STEP_TAGS, shown
from sharding.errors import UserError
from sharding.storage import LocalStorage, Storage, StorageUnavailableError, StoredObject, open_storage
from tests.conftest import S3
from tests.pipeline.monitor.runs import with_seed, write_run


class Shown:
    """A board below which a test looks."""

    def __init__(self, root: Path, *uris: str) -> None:
        self.root = root
        self.watch = Watch(uris, root)
        self._pool = ThreadPoolExecutor(2)

    def update(self) -> None:
        self.watch.look(self._pool)
        for _ in range(20):  # a run that rests is asked again
            self.watch.update(self._pool)

    def names(self) -> set[str]:
        return {path.parent.relative_to(self.root).as_posix() for path in self.root.rglob("*tfevents*")} - {"(layout)"}

    def read(self, run: str) -> EventAccumulator:
        return EventAccumulator(str(self.root / run), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()

    def curve(self, run: str, tag: str) -> dict[int, float]:
        return {event.step: event.value for event in self.read(run).Scalars(tag)}


def show(tmp_path: Path, *uris: str) -> Shown:
    return Shown(tmp_path / "board", *uris)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder, and a prefix."""
    if request.param == "local":
        yield str(tmp_path / "runs")
        return
    s3: S3 = request.getfixturevalue("s3")
    yield s3.prefix()


def test_ranks_are_one_curve_with_a_band_and_a_restart_leaves_no_trace(place: str, tmp_path: Path) -> None:
    write_run(f"{place}/deep/er/two", [1, 2, 3, 4], {2: [1.0, 3.0], 4: [9.0, 9.0]}, ranks=2, retries=2)
    board = show(tmp_path, place)
    board.update()
    assert board.names() == {f"deep/er/two{band}" for band in ("", "/min", "/max", "/p95")}
    run = "deep/er/two"
    assert board.curve(run, "loss/train")[2] == 2.0
    assert board.curve(f"{run}/min", "loss/train") == {2: 1.0}
    assert board.curve(f"{run}/max", "loss/train") == {2: 3.0}
    waits = [board.curve(name, "speed/data_wait_seconds")[1] for name in (run, f"{run}/p95", f"{run}/max")]
    assert waits == pytest.approx([0.5, 0.95, 1.0])
    assert board.curve(run, "store/dataset_retries") == {3: 0, 4: 4}
    assert not [tag for tag in board.read(run).Tags()["scalars"] if "quarantined" in tag]
    # On one rank again from step 3.
    write_run(f"{place}/deep/er/two", [3, 4, 5], {4: [7.0]}, config=RunConfig())
    board.update()
    assert [board.curve(run, "loss/train")[step] for step in (2, 4, 5)] == pytest.approx([2, 7, 1 / 5])
    # Whoever comes later sees the same.
    again = Shown(tmp_path / "again", place)
    again.update()
    assert again.curve(run, "loss/train") == board.curve(run, "loss/train")


def test_runs_that_begin_later_appear_and_what_is_no_run_does_not(place: str, tmp_path: Path) -> None:
    open_storage(place).write("dataset/shards/a.tar", b"x")
    open_storage(place).write(".hidden/events/rank-0/events.out.tfevents.1", b"x")
    board = show(tmp_path, place)
    board.update()
    assert board.names() == set()
    write_run(f"{place}/later", [1, 2])
    board.update()
    assert board.names() == {"later"}
    write_run(f"{place}/later", [3])
    board.update()
    assert list(board.curve("later", "loss/train")) == [1, 2, 3]


def test_runs_of_one_configuration_have_a_mean_and_a_spread(tmp_path: Path) -> None:
    place = tmp_path / "runs"
    for seed, loss in ((1, 2.0), (2, 4.0)):
        steps = [1, 2, 3] if seed == 1 else [1, 2]
        write_run(
            f"{place}/a/seed-{seed}", steps, {step: [loss] for step in steps}, config=with_seed(RunConfig(), seed)
        )
    other = replace(RunConfig(), train=replace(RunConfig().train, learning_rate=1.0))
    write_run(f"{place}/b", [1, 2, 3], config=other)
    board = show(tmp_path, str(place))
    board.update()
    groups = [{1: 3.0, 2: 3.0}, dict.fromkeys((1, 2), 3 - 2**0.5), dict.fromkeys((1, 2), 3 + 2**0.5)]
    for name, values in zip(("mean", "low", "high"), groups, strict=True):
        assert board.curve(f"a/seeds-{name}", "loss/train") == pytest.approx(values)
    assert not [name for name in board.names() if name.startswith("b/")]
    # A third seed changes what is shown already.
    write_run(f"{place}/a/seed-3", [1, 2], {1: [6.0], 2: [6.0]}, config=with_seed(RunConfig(), 3))
    board.update()
    assert board.curve("a/seeds-mean", "loss/train") == {1: 4.0, 2: 4.0}
    assert board.curve("a/seeds-low", "loss/train") == {1: 2.0, 2: 2.0}


def test_texts_hyperparameters_images_and_layout(tmp_path: Path) -> None:
    write_run(f"{tmp_path}/runs/one", [1, 2], panel=True, psnr=31.0)
    board = show(tmp_path, f"{tmp_path}/runs/one")
    board.update()
    read = board.read("one")
    assert read.Tags()["images"] == ["validation/chip 0"]
    texts = {tag: read.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"][:3]}
    assert '    encoder = "srcnn"\n' in texts["run/configuration"]
    assert f'digest = "{"d" * 64}"' in texts["run/dataset"]
    assert 'torch = "2.13.0"' in texts["run/versions"]
    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (hparams["model.encoder"].string_value, hparams["environment.world_size"].number_value) == ("srcnn", 1)
    content = board.read("(layout)").SummaryMetadata("_hparams_/experiment").plugin_data.content
    leading = {info.name for info in HParamsPluginData.FromString(content).experiment.hparam_infos if info.differs}
    assert {"model.encoder", "model.head", "train.seed"} < leading
    assert "data.simulate" not in leading
    layout = board.read("(layout)").Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    charts = [chart for category in Layout.FromString(layout).category for chart in category.chart]
    assert [chart.title for chart in charts[:4]] == ["loss", "PSNR, dB", "chips a second", "wait for data, s"]
    assert [chart.title for chart in charts[4:]] == ["retries and damage, counts", "writing checkpoints, s"]
    drawn = {tag for chart in charts[4:] for tag in chart.multiline.tag}
    of_stores = {tag for tag in (shown(stored).tag for stored in STEP_TAGS) if tag.startswith("store/")}
    assert drawn == {f"^{re.escape(tag)}$" for tag in of_stores}, "the operator sees all that is counted of stores"
    assert board.watch.table().splitlines()[1].split()[:5] == ["one", "srcnn+pnn", "2", "31", "31"]


def test_names_of_older_runs_are_shown_as_those_of_new_ones(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "runs/old" / AGGREGATE, 1, segmented=False)
    tags = (
        "time/samples_per_second",
        "time/samples_per_second_min",
        "time/samples_per_second_max",
        "val/psnr_adjusted",
    )
    file.add(1, Summary(value=[Summary.Value(tag=tag, simple_value=number) for number, tag in enumerate(tags)]))
    file.close()
    board = show(tmp_path, str(tmp_path / "runs"))
    board.update()
    assert set(board.read("old").Tags()["scalars"]) == {"speed/chips_per_second", "quality-adjusted/psnr"}
    assert board.curve("old/max", "speed/chips_per_second") == {1: 2.0}


def test_what_cannot_be_read_is_named_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = tmp_path / "runs"
    write_run(f"{runs}/good", [1])
    write_run(f"{runs}/cut", [1, 2])
    (cut,) = (runs / "cut/events/aggregate").iterdir()
    cut.write_bytes(cut.read_bytes()[:-3] + b"\xff" * 1000)
    (runs / "cut/config.json").write_text('{"train": 3, "model": {"encoder": ["x"], "hidden": NaN}}')
    write_run(f"{runs}/climb\x1b[2J", [1])
    (runs / "noise/events/aggregate").mkdir(parents=True)
    (runs / "noise/events/aggregate/events.out.tfevents.1").write_bytes(b"\xff" * 100)
    board = show(tmp_path, str(runs))
    with caplog.at_level(logging.WARNING):
        board.update()
        board.update()
    assert board.names() == {"good", "cut"}
    assert list(board.curve("cut", "loss/train")) == [1]
    for word in ("events.out.tfevents.1 is skipped", f"{cut.name} is skipped", "not shown: 'climb"):
        assert sum(word in line for line in caplog.messages) == 1
    assert len(caplog.messages) == 3
    assert all(line.isprintable() for line in caplog.messages)


def test_a_folder_that_cannot_be_listed_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs = tmp_path / "runs"
    write_run(f"{runs}/good", [1])
    (runs / "private").mkdir()
    scandir = os.scandir

    def closed(folder: str | Path) -> object:
        if Path(folder).name == "private":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    board = show(tmp_path, str(runs))
    for _ in range(2):
        board.update()
    assert board.names() == {"good"}
    assert [line for line in caplog.messages if "not shown" in line] == [
        f"not shown: cannot use {runs}/private: Permission denied; check the path and its permissions"
    ]
    with pytest.raises(UserError, match=r"cannot use .*private: Permission denied"):
        show(tmp_path, str(runs / "private")).update()


@pytest.mark.parametrize("climbing", ["../" * 12, "/", "rank-0/../../"])
def test_a_listing_that_climbs_writes_nowhere_else(
    climbing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(f"{tmp_path}/run", [1], config=replace(RunConfig(), train=replace(RunConfig().train, profile=2)))
    keys = [f"{climbing}{tmp_path}/harm{TRACE_SUFFIX}", f"rank-0/good{TRACE_SUFFIX}"]
    listed = LocalStorage.list
    monkeypatch.setattr(
        LocalStorage, "list", lambda place, prefix="": [*(StoredObject(key, 4) for key in keys), *listed(place, prefix)]
    )
    monkeypatch.setattr(LocalStorage, "stream", lambda place, key: iter([b"data"]))
    board = show(tmp_path, str(tmp_path / "run"))
    board.update()
    assert board.curve("run", "loss/train") == {1: 1.0}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "board"}
    assert [path.name for path in tmp_path.rglob(f"*{TRACE_SUFFIX}")] == [f"good{TRACE_SUFFIX}"]
    assert sum(f"{keys[0]!r} is no key of" in line for line in caplog.messages) == 1


def test_profiles_are_beside_the_events_of_their_rank(place: str, tmp_path: Path) -> None:
    write_run(f"{place}/run", [1], config=replace(RunConfig(), train=replace(RunConfig().train, profile=2)))
    open_storage(f"{place}/run/events/rank-1").write(f"rank-1{TRACE_SUFFIX}", b"trace")
    board = show(tmp_path, place)
    board.update()
    assert (tmp_path / f"board/run/rank-1/rank-1{TRACE_SUFFIX}").read_bytes() == b"trace"


def test_a_configuration_that_cannot_be_read_now_hides_no_curve_and_is_shown_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has ended: no new event tells the monitor to look at it again."""
    run = tmp_path / "runs/one"
    away = [True]

    def read(storage: Storage) -> Facts | None:
        if away[0]:
            raise StorageUnavailableError("the store is away")
        return read_facts(storage)

    monkeypatch.setattr(board_module, "read_facts", read)
    board = show(tmp_path, str(tmp_path / "runs"))
    write_run(str(run), [1, 2, 3])
    board.update()
    assert list(board.curve("one", "loss/train")) == [1, 2, 3]
    assert board.watch.runs["one"].facts is None
    away[0] = False
    board.update()
    assert board.watch.runs["one"].facts == read_facts(open_storage(str(run)))
    assert "run/configuration" in board.read("one").Tags()["tensors"]
    # Begun again with another configuration, while the store is away.
    away[0] = True
    write_run(str(run), [3, 4], config=with_seed(RunConfig(), 7))
    board.update()
    assert list(board.curve("one", "loss/train")) == [1, 2, 3, 4]
    away[0] = False
    board.update()
    facts = board.watch.runs["one"].facts
    assert facts is not None
    assert facts.seed == 7


@pytest.mark.parametrize("failing", range(1, 16, 2))
def test_what_could_not_be_written_is_written_later_and_once(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the writes fails in turn, in the middle of the events that are read together."""
    for seed in (1, 2):
        losses = {step: [1.0, 3.0 * seed] for step in (1, 2, 3)}
        write_run(f"{tmp_path}/runs/{seed}", [1, 2, 3], losses, ranks=2, config=with_seed(RunConfig(), seed))
    monkeypatch.setattr(board_module, "_MOST_PENDING", 1)
    write, calls = Board.write, [0]

    def full(board: Board, folder: str, events: Sequence[Event]) -> None:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(board, folder, events)

    board = show(tmp_path, str(tmp_path / "runs"))
    monkeypatch.setattr(Board, "write", full)
    with contextlib.suppress(OSError):  # raised where the means cannot be written
        board.update()
    board.update()
    assert calls[0] > failing
    for seed in (1, 2):
        assert [event.step for event in board.read(f"{seed}").Scalars("loss/train")] == [1, 2, 3]
        assert [event.step for event in board.read(f"{seed}/max").Scalars("loss/train")] == [1, 2, 3]
        assert "run/configuration" in board.read(f"{seed}").Tags()["tensors"]
    (mean,) = [name for name in board.names() if name.endswith("seeds-mean")]
    assert board.curve(mean, "loss/train") == dict.fromkeys((1, 2, 3), (2.0 + 3.5) / 2)


def test_means_that_could_not_be_written_are_written_later_for_a_new_seed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        write_run(f"{tmp_path}/runs/{seed}", [1, 2], {1: [seed], 2: [seed]}, config=with_seed(RunConfig(), seed))
    board = show(tmp_path, str(tmp_path / "runs"))
    board.update()
    (mean,) = [name for name in board.names() if name.endswith("seeds-mean")]
    assert board.curve(mean, "loss/train") == {1: 1.5, 2: 1.5}
    write_run(f"{tmp_path}/runs/3", [2], {2: [6.0]}, config=with_seed(RunConfig(), 3))
    write = Board.write

    def full(board: Board, folder: str, events: Sequence[Event]) -> None:
        if "seeds-" in folder:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(board, folder, events)

    with monkeypatch.context() as patch:
        patch.setattr(Board, "write", full)
        with pytest.raises(OSError, match="No space left"):
            board.update()
    board.update()
    assert board.curve(mean, "loss/train") == {2: 3.0}


def test_a_write_that_fails_half_way_leaves_no_part_of_a_record(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.write("run", [start(1)])
    (file,) = (tmp_path / "run").iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            board.write("run", [start(2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    board.write("run", [start(3)])
    assert [event.step for event in RecordReader().events(file.read_bytes())] == [0, 1, 3]


def test_an_error_in_one_folder_loses_no_run_that_was_found_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(f"{tmp_path}/runs/first", [1])
    write_run(f"{tmp_path}/runs/deep/er/second", [1])
    folders = LocalStorage.folders

    def away(place: LocalStorage) -> tuple[str, ...]:
        if place.uri.endswith("er"):
            raise StorageUnavailableError("the store is away")
        return folders(place)

    board = show(tmp_path, str(tmp_path / "runs"))
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "folders", away)
        with pytest.raises(StorageUnavailableError):
            board.update()
    board.update()
    assert board.names() == {"first", "deep/er/second"}


def test_a_folder_whose_name_is_not_utf_8_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs, odd = tmp_path / "runs", os.fsdecode(b"caf\xe9")
    write_run(f"{runs}/good", [1])
    write_run(f"{runs}/{odd}", [1])
    board = show(tmp_path, str(runs))
    board.update()
    board.update()
    assert board.names() == {"good"}
    assert caplog.messages == [f"not shown: 'caf\\udce9' in {runs} is no UTF-8 or too long: rename it"]
    # Named by the user, it is shown under another name.
    named = Shown(tmp_path / "named", f"{runs}/{odd}", f"{runs}/good")
    named.update()
    assert named.names() == {"run", "good"}


@pytest.mark.parametrize("encoder", ["\ud800", "../up", "\x1b[2J", "x" * 300])
def test_any_text_in_a_configuration_is_shown_or_left_out(encoder: str, tmp_path: Path) -> None:
    """The runs have no folder in common, so the group would have the model's name."""
    for seed in (1, 2):
        run = tmp_path / f"runs/{seed}"
        write_run(str(run), [1], {1: [1.0 + seed]})
        facts = {
            "model": {"encoder": encoder, "head": "pnn", "hidden": 3},
            "train": {"seed": seed, "learning_rate": 0.25, "precision\ud800": "x"},
            "odd\udfff": {"a": 1},
        }
        (run / "config.json").write_text(json.dumps(facts))
    board = show(tmp_path, str(tmp_path / "runs"))
    board.update()
    (mean,) = [name for name in board.names() if name.endswith("seeds-mean")]
    assert board.curve(mean, "loss/train") == {1: 2.5}
    content = board.read("1").SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["train.learning_rate"].number_value == 0.25
    assert "model.encoder" not in hparams if encoder == "\ud800" else hparams["model.encoder"].string_value == encoder
