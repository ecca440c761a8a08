"""The loop through the real command: worlds agree, a killed run resumes, and invalid input is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.registry import build_model
from pipeline.config import RunConfig
from pipeline.reporting.run_folder import RunFolder
from pipeline.training.checkpoint import complete_checkpoints
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.errors import UserError
from sharding.storage import open_storage
from sharding.storage.lock import JOB_VARIABLE, Holder
from sharding.storage.s3 import store
from tests.command import column, last_checkpoint, run_command, start_command
from tests.conftest import S3
from tests.uploads import begin_upload, unfinished

MakeConfig = Callable[..., RunConfig]


def command(config: RunConfig, folder: Path) -> list[str]:
    path = folder / "config.toml"
    path.write_text(config.to_toml())
    return ["train", str(path)]


@pytest.mark.distributed
def test_one_rank_and_two_see_the_same_losses(make_config: MakeConfig, tmp_path: Path) -> None:
    def run(ranks: int, stage: int) -> tuple[list[float], list[str], list[str]]:
        folder = tmp_path / f"{ranks}-ranks-stage-{stage}"
        run_command(ranks, command(make_config(folder, "train.max_steps=10", f"train.zero_stage={stage}"), tmp_path))
        losses = [float(loss) for loss in column(folder, "train/loss")]
        return losses, column(folder, "step"), column(folder, "chips", "batches.csv")

    alone = run(1, 0)
    assert len(alone[0]) == 10
    for stage in (0, 2):
        losses, *order = run(2, stage)
        assert losses == pytest.approx(alone[0], rel=1e-5)
        assert order == [*alone[1:]]


@pytest.mark.distributed
def test_a_killed_run_goes_on_bit_for_bit(make_config: MakeConfig, tmp_path: Path) -> None:
    """Epochs have 9 steps and checkpoints come every 5: step 7 ends neither."""
    options = ("train.max_steps=12", "train.checkpoint_every=5", "train.micro_batch=1", "model.dropout=published")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run_command(2, command(make_config(undisturbed, *options), tmp_path))

    again = command(make_config(killed, *options), tmp_path)
    ranks = start_command(2, again, held_at=9)
    try:
        deadline = time.monotonic() + 400
        while not ((killed / "metrics.csv").exists() and len(column(killed, "step")) >= 7):
            assert time.monotonic() < deadline, ranks.output()
            time.sleep(0.002)
    finally:
        ranks.kill()
    assert 7 <= int(column(killed, "step")[-1]) < 10
    assert complete_checkpoints(open_storage(killed), "step") == [5]

    finished = run_command(2, again)
    assert f"resuming from {open_storage(killed).uri}/checkpoints/step-5" in finished.output
    assert column(killed, "chips", "batches.csv") == column(undisturbed, "chips", "batches.csv")
    assert column(killed, "train/loss") == column(undisturbed, "train/loss")
    ours, theirs = last_checkpoint(killed), last_checkpoint(undisturbed)
    assert ours.position.step == 12
    assert all(torch.equal(ours.state.weights[n], theirs.state.weights[n]) for n in theirs.state.weights)
    assert all(
        torch.equal(ours.state.moments[n][m], theirs.state.moments[n][m])
        for n, moments in theirs.state.moments.items()
        for m in moments
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_another_world_and_stage_go_on_from_the_same_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    constant = "train.schedule=warm_restarts"  # their rates do not depend on max_steps
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    run_command(1, command(make_config(alone, constant, "train.max_steps=8"), tmp_path))
    run_command(2, command(make_config(moved, constant, "train.max_steps=4", "train.zero_stage=3"), tmp_path))
    run_command(1, command(make_config(moved, constant, "train.max_steps=8", "train.zero_stage=1"), tmp_path))
    assert column(moved, "chips", "batches.csv") == column(alone, "chips", "batches.csv")
    losses = [[float(loss) for loss in column(run, "train/loss")] for run in (moved, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("encoder", "head", "used"), [("srcnn", "none", ("encoder.", "upsampler.")), ("none", "pnn", ("head.",))]
)
def test_a_stage_alone_trains_what_it_uses(
    world: World, encoder: str, head: str, used: tuple[str, ...], make_config: MakeConfig, tmp_path: Path
) -> None:
    options = (f"model.encoder={encoder}", f"model.head={head}", "train.zero_stage=2", "train.weight_decay=0")
    config = make_config(tmp_path, "train.max_steps=2", *options)
    run_training(config)
    torch.manual_seed(config.train.seed)
    initial = build_model(config.model).state_dict()
    trained = last_checkpoint(tmp_path).state.weights
    for name, value in initial.items():
        assert torch.equal(value, trained[name]) != name.startswith(used), name


def test_a_run_folder_on_s3_holds_what_a_local_one_holds(
    world: World, make_config: MakeConfig, tmp_path: Path, s3: S3
) -> None:
    target = s3.prefix()
    options = ("train.max_steps=4", "train.checkpoint_every=2", "output.sync_seconds=0.2")
    for where in (str(tmp_path), target):
        run_training(make_config(where, *options))
    here, there = (
        {stored.key.rsplit("/events.", 1)[0] for stored in open_storage(w).list()} for w in (tmp_path, target)
    )
    assert here == there
    assert {"metrics.csv", "batches.csv", "config.json", "events/rank-0", "events/aggregate"} <= there
    stored = open_storage(target).read("metrics.csv").decode().splitlines()
    losses = [row.split(",")[2] for row in stored[1:]]
    assert losses == column(tmp_path, "train/loss")


@pytest.mark.distributed
def test_a_run_on_s3_killed_between_uploads_loses_no_step(make_config: MakeConfig, tmp_path: Path, s3: S3) -> None:
    """Events and tables are uploaded before the checkpoint that follows their steps."""
    target = s3.prefix()
    storage = open_storage(target)
    config = command(make_config(target, "train.max_steps=14", "train.checkpoint_every=5"), tmp_path)
    rank = start_command(1, config, held_at=9)
    try:
        deadline = time.monotonic() + 400
        while complete_checkpoints(storage, "step") != [5]:
            assert time.monotonic() < deadline, rank.output()
            time.sleep(0.002)
    finally:
        rank.kill()
    run_command(1, config)
    rows = storage.read("metrics.csv").decode().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [str(step) for step in range(1, 15)]
    assert len(storage.read("batches.csv").decode().splitlines()) == 1 + 14


def test_a_start_removes_the_parts_of_a_killed_checkpoint(
    world: World,
    make_config: MakeConfig,
    s3: S3,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "ABANDONED_S", -60.0)  # as after an hour
    storage = open_storage(s3.prefix())
    for key in ("checkpoints/step-1/state.pt", "another/checkpoints/step-1/state.pt"):
        begin_upload(s3, storage, key)
    with caplog.at_level("INFO"):
        run_training(make_config(storage.uri, "train.max_steps=1"))
    assert "removed the parts of killed uploads: 1" in caplog.text
    assert unfinished(s3, storage) == ["another/checkpoints/step-1/state.pt"]


def test_leaving_does_not_hide_what_went_wrong(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(s3.prefix(), 60)
    monkeypatch.setattr(run.storage, "write", refuse)

    def fail() -> None:
        with run:
            (run.local / "metrics.csv").write_text("step")
            raise ValueError("the real reason")

    with pytest.raises(ValueError, match="the real reason"):
        fail()
    assert not run.local.exists()


def refuse(key: str, data: bytes) -> None:
    raise UserError("the store is away")


def test_what_a_run_writes(world: World, make_config: MakeConfig, tmp_path: Path) -> None:
    run_training(make_config(tmp_path, "train.max_steps=3", "train.keep_checkpoints=1", "train.checkpoint_every=1"))
    assert complete_checkpoints(open_storage(tmp_path), "step") == [3]
    assert complete_checkpoints(open_storage(tmp_path), "best") == [3]
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["environment"]["world_size"] == 1
    assert recorded["environment"]["threads_per_rank"] == 1
    assert recorded["model"]["hidden"] == 8
    own = EventAccumulator(str(tmp_path / "events" / "rank-0")).Reload()
    joint = EventAccumulator(str(tmp_path / "events" / "aggregate"), size_guidance={"images": 0}).Reload()
    tags = {"train/loss", "train/mse", "train/learning_rate", "train/grad_norm", "time/chips_per_second"}
    assert tags | {"time/data_wait_seconds", "val/psnr"} <= set(own.Tags()["scalars"])
    assert {"train/loss", "train/loss_min", "train/loss_max", "val/psnr_adjusted"} <= set(joint.Tags()["scalars"])
    assert joint.Tags()["images"] == ["val/0"]
    assert [event.value for event in own.Scalars("train/loss")] == pytest.approx(
        [float(loss) for loss in column(tmp_path, "train/loss")]
    )
    assert (tmp_path / "images" / "val" / "0-step-3.png").stat().st_size > 1000


def test_a_run_folder_that_another_job_writes_to_is_refused(
    world: World, make_config: MakeConfig, tmp_path: Path
) -> None:
    storage = open_storage(tmp_path)
    storage.write(".lock/000001.json", replace(Holder.here("train"), job="another", host="elsewhere").to_bytes())
    with pytest.raises(UserError, match=r"is being written by `satfusion train` of .* on elsewhere"):
        run_training(make_config(tmp_path, "train.max_steps=1"))
    assert [item.key for item in storage.list()] == [".lock/000001.json"]
    storage.delete(".lock/000001.json")
    storage.write("events/mine.txt", b"mine")
    with pytest.raises(UserError, match=r"holds 'events/mine\.txt', and neither a config\.json nor a"):
        run_training(make_config(tmp_path, "train.max_steps=1"))
    assert [item.key for item in storage.list()] == ["events/mine.txt"]
    storage.delete("events/mine.txt")
    assert run_training(make_config(tmp_path, "train.max_steps=1")).step == 1
    assert not (tmp_path / ".lock").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_of_two_trainings_the_second_is_refused_and_a_restart_of_the_first_is_not(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    run, job = tmp_path / "run", {JOB_VARIABLE: "night"}
    settings = ("train.max_steps=3", "train.engine=torch", "train.hang_seconds=0")  # the first one is held
    config = command(make_config(run, *settings), tmp_path)
    first = start_command(1, config, job, held_at=2)
    try:
        deadline = time.monotonic() + 400
        while not ((run / "metrics.csv").exists() and len(column(run, "step")) == 2):
            assert time.monotonic() < deadline, first.output()
            time.sleep(0.01)
        second = start_command(1, config)
        refused = second.wait()
        assert refused.statuses == [2], refused.output
        named = rf"is being written by `satfusion train` of .+, pid {first.processes[0].pid} \(job night\), since 20"
        assert re.search(named, refused.output), refused.output
        # The first one still lives, and its heartbeat is fresh.
        restarted = start_command(1, config, job).wait()
        assert restarted.statuses == [0], restarted.output
        assert first.processes[0].poll() is None
    finally:
        first.kill()
    assert column(run, "step") == ["1", "2", "3"]
    assert complete_checkpoints(open_storage(run), "step") == [3]


def test_a_run_that_lost_its_record_resumes_from_its_checkpoint(
    world: World, make_config: MakeConfig, tmp_path: Path
) -> None:
    run_training(make_config(tmp_path, "train.max_steps=4", "train.checkpoint_every=2"))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds a run with another train\.seed"):
        run_training(make_config(tmp_path, "train.max_steps=4", "train.seed=5"))
    assert not (tmp_path / "config.json").exists()
    assert run_training(make_config(tmp_path, "train.max_steps=6", "train.checkpoint_every=2")).step == 6
    assert column(tmp_path, "step") == ["1", "2", "3", "4", "5", "6"]
    assert (tmp_path / "config.json").exists()


def test_a_finished_run_does_nothing_more(world: World, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path, "train.max_steps=2")
    run_training(config)
    before = (tmp_path / "metrics.csv").read_bytes()
    run_training(config)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_loss_that_is_no_number_stops_with_step_and_chips(
    world: World, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(tmp_path, "train.max_steps=9", "train.learning_rate=1e30", "train.schedule=warm_restarts")
    with pytest.raises(UserError, match=r"not finite at step \d on rank 0; the global batch was .+/\d"):
        run_training(config)
    assert complete_checkpoints(open_storage(tmp_path), "step") == []


@pytest.mark.parametrize(("keep", "left"), [(3, [1, 2]), (1, [3])])
def test_weights_that_diverged_are_not_gone_on_from_while_others_are_left(
    keep: int, left: list[int], world: World, make_config: MakeConfig, tmp_path: Path
) -> None:
    """The update of step 3 is the bad one; a run whose last checkpoint is discarded would start over."""
    options = ("train.schedule=warm_restarts", "train.checkpoint_every=1", f"train.keep_checkpoints={keep}")
    run_training(make_config(tmp_path, "train.max_steps=2", *options))
    best = (tmp_path / "checkpoints" / "best-2" / "state.pt").read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match="not finite at step 4"):
            run_training(make_config(tmp_path, "train.max_steps=9", "train.learning_rate=1e30", *options))
        assert complete_checkpoints(open_storage(tmp_path), "step") == left
        assert (tmp_path / "checkpoints" / "best-2" / "state.pt").read_bytes() == best


def test_weights_that_diverged_do_not_become_the_best(world: World, make_config: MakeConfig, tmp_path: Path) -> None:
    diverging = ("train.learning_rate=1e30", "train.schedule=warm_restarts", "train.checkpoint_every=1")
    with pytest.raises(UserError, match=r"validation loss is not finite after step 1"):
        run_training(make_config(tmp_path, "train.max_steps=1", *diverging))
    assert complete_checkpoints(open_storage(tmp_path), "best") == []
    assert complete_checkpoints(open_storage(tmp_path), "step") == []


@pytest.mark.parametrize("initial", [False, True])
def test_a_run_that_was_killed_in_its_first_upload_starts_over_and_keeps_better_weights(
    initial: bool, world: World, make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if initial:
        run_training(make_config(tmp_path / "first", "train.max_steps=1"))
    options = (f"train.init={tmp_path}/first",) if initial else ()
    run = tmp_path / "run"
    found = run_training(make_config(run, "train.max_steps=9", *options))
    (run / "checkpoints" / "step-9" / "COMPLETE").unlink()
    again = run_training(make_config(run, "train.max_steps=1", "train.learning_rate=1e-6", *options))
    assert "the best weights, of step 9, stay until better ones are found" in caplog.text
    assert again.step == 1
    assert again.best_loss == found.best_loss
    assert complete_checkpoints(open_storage(run), "best") == [9]
    assert complete_checkpoints(open_storage(run), "step") == [1]


def test_a_damaged_checkpoint_is_passed_over(world: World, make_config: MakeConfig, tmp_path: Path, caplog) -> None:
    run_training(make_config(tmp_path, "train.max_steps=4", "train.checkpoint_every=2"))
    newest = tmp_path / "checkpoints" / "step-4" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / "checkpoints" / "step-9").mkdir()
    with caplog.at_level("INFO"):
        run_training(make_config(tmp_path, "train.max_steps=4", "train.checkpoint_every=2"))
    assert "is damaged" in caplog.text
    assert "checkpoints/step-2" in caplog.text
    assert last_checkpoint(tmp_path).position.step == 4


def test_a_run_never_starts_over_by_itself(world: World, make_config: MakeConfig, tmp_path: Path) -> None:
    run_training(make_config(tmp_path, "train.max_steps=2"))
    folder = tmp_path / "checkpoints" / "step-2"
    (folder / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"every checkpoint in .+ is damaged"):
        run_training(make_config(tmp_path, "train.max_steps=3"))
    meta = json.loads((folder / "checkpoint.json").read_text()) | {"format_version": 99}
    run_training(make_config(tmp_path / "other", "train.max_steps=1"))
    save_checkpoint_of_another_version(tmp_path / "other", meta)
    with pytest.raises(UserError, match="has checkpoint format 99"):
        run_training(make_config(tmp_path / "other", "train.max_steps=2"))


def save_checkpoint_of_another_version(run: Path, meta: dict[str, object]) -> None:
    folder = run / "checkpoints" / "step-1"
    data = json.dumps(meta).encode()
    (folder / "checkpoint.json").write_bytes(data)
    marker = json.loads((folder / "COMPLETE").read_text())
    marker["checkpoint.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "COMPLETE").write_text(json.dumps(marker))


def test_a_run_killed_before_its_first_checkpoint_is_a_run_too(
    world: World, make_config: MakeConfig, tmp_path: Path
) -> None:
    run_training(make_config(tmp_path, "train.max_steps=1"))
    shutil.rmtree(tmp_path / "checkpoints")
    again = make_config(tmp_path, "train.max_steps=1")
    with pytest.raises(UserError, match="another model"):
        run_training(make_config(tmp_path, "train.max_steps=1", "model.head=pannet"))
    run_training(again)
    assert column(tmp_path, "step") == ["1"]
    shown = EventAccumulator(str(tmp_path / "events" / "rank-0")).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.hidden=16", "another model"),
        ("model.head=pannet", "another model"),
        ("train.seed=1", "another train.seed"),
        ("loss.bias_adjust=true", "another loss"),
        ("train.global_batch=2", "another train.global_batch"),
        ("model.revisits=4", "model.revisits = 4"),
    ],
)
def test_a_run_folder_of_another_run_is_refused(
    change: str, words: str, world: World, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.getbasetemp() / "finished-run"
    if not run.exists():
        run_training(make_config(run, "train.max_steps=1"))
    with pytest.raises(UserError, match=words):
        run_training(make_config(run, "train.max_steps=2", change))
