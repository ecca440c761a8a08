"""Checkpoints in the background: training goes on meanwhile, and ends the same; failures and stops reach every rank."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config import RunConfig
from pipeline.engines.engine import TrainState
from pipeline.reporting.run_folder import RunFolder
from pipeline.training import loop, saving
from pipeline.training.checkpoint import Position, complete_checkpoints, read_checkpoint, save_checkpoint
from pipeline.training.loop import run_training
from pipeline.training.validation import Validated, validate
from pipeline.world import World
from sharding.errors import UserError
from sharding.storage import open_storage
from tests.command import column, last_checkpoint

MakeConfig = Callable[..., RunConfig]
LARGE = ("train.global_batch=12", "train.engine=torch", "train.schedule=warm_restarts")
"""Three steps an epoch."""


def steps(folder: Path, kind: str = "step") -> list[int]:
    return complete_checkpoints(open_storage(folder), kind)


def state(folder: Path, step: int) -> TrainState:
    return read_checkpoint(open_storage(folder), f"step-{step}").state


def same(ours: TrainState, theirs: TrainState) -> bool:
    moments = [(ours.moments[n][m], theirs.moments[n][m]) for n, both in theirs.moments.items() for m in both]
    weights = [(ours.weights[name], theirs.weights[name]) for name in theirs.weights]
    return all(torch.equal(*pair) for pair in (*weights, *moments))


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_training_continues_while_a_checkpoint_is_written(
    world: World, engine: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer of step 2 waits for the row of step 3; the state that it then writes is that of step 2."""
    options = ("train.max_steps=4", "train.checkpoint_every=2", f"train.engine={engine}", "train.zero_stage=0")
    submit = saving.Saver.submit

    def at_once(self: saving.Saver, snapshot: saving.Snapshot) -> None:
        submit(self, snapshot)
        self.wait()

    with monkeypatch.context() as patch:
        patch.setattr(saving.Saver, "submit", at_once)
        run_training(make_config(tmp_path / "at-once", *options))

    later: list[bool] = []

    def save(storage: object, name: str, *rest: object) -> None:
        deadline = time.monotonic() + 60
        while name == "step-2" and "3" not in column(tmp_path / "run", "step") and time.monotonic() < deadline:
            time.sleep(0.01)
        later.append("3" in column(tmp_path / "run", "step"))
        save_checkpoint(storage, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "save_checkpoint", save)
    run_training(make_config(tmp_path / "run", *options))
    assert all(later)
    assert steps(tmp_path / "run") == steps(tmp_path / "at-once") == [2, 4]
    for step in (2, 4):
        assert same(state(tmp_path / "run", step), state(tmp_path / "at-once", step))


def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    world: World, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(saving, "save_checkpoint", refuse)
    # The third checkpoint at the latest would wait for the first one.
    with pytest.raises(UserError, match="the disk is full"):
        run_training(make_config(tmp_path, *LARGE, "train.max_steps=9", "train.checkpoint_every=1"))
    assert steps(tmp_path) == []
    assert len(column(tmp_path, "step")) <= 2


def test_checkpoints_are_made_by_time_too(world: World, make_config: MakeConfig, tmp_path: Path) -> None:
    run_training(make_config(tmp_path, *LARGE, "train.max_steps=3", "train.checkpoint_seconds=1e-9"))
    assert steps(tmp_path) == [1, 2, 3]


def test_a_run_that_is_asked_to_stop_ends_at_a_checkpoint_and_resumes_bit_for_bit(
    world: World, make_config: MakeConfig, tmp_path: Path
) -> None:
    undisturbed, stopped = (make_config(tmp_path / name, *LARGE, "train.max_steps=6") for name in ("whole", "stopped"))
    run_training(undisturbed)
    stop = threading.Event()
    result = run_training(stopped, lambda metrics: stop.set(), stop)  # asked after the validation of step 3
    assert (result.step, result.stopped) == (4, True)
    assert steps(tmp_path / "stopped") == [4]
    assert run_training(stopped, stop=stop) == replace(result, step=4)  # asked before the first step

    result = run_training(stopped)
    assert (result.step, result.stopped) == (6, False)
    assert same(state(tmp_path / "stopped", 6), state(tmp_path / "whole", 6))
    for name, file in (("train/loss", "metrics.csv"), ("chips", "batches.csv")):
        assert column(tmp_path / "stopped", name, file) == column(tmp_path / "whole", name, file)

    account = json.loads((tmp_path / "stopped" / "time.json").read_text())
    assert (account["starts"], account["step"], account["counted"], account["complete"]) == (2, 6, 6, True)
    assert account["seconds"].keys() == {"start", "data", "steps", "validation", "checkpoints", "restarts"}
    effective = [float(value) for value in column(tmp_path / "stopped", "time/effective")]
    assert effective[0] == 0  # the first step counts as a part of the start
    assert all(0 < value < 1 for value in effective[1:])


def test_a_process_that_is_killed_before_its_first_step_counts_as_a_start(
    world: World, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*arguments: object) -> None:
        raise Killed

    config = make_config(tmp_path, *LARGE, "train.max_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "train_epoch", kill)
        for starts in (1, 2):
            with pytest.raises(Killed):
                run_training(config)
            account = json.loads((tmp_path / "time.json").read_text())
            assert (account["starts"], account["step"], account["complete"]) == (starts, 0, False)
    for _ in range(2):  # The second has nothing to do, and changes nothing.
        run_training(config)
        account = json.loads((tmp_path / "time.json").read_text())
        assert (account["starts"], account["step"], account["complete"]) == (3, 1, True)


def test_the_best_weights_of_a_step_are_not_rewritten_when_it_is_taken_again(
    world: World, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a process that is killed meanwhile would leave none."""
    config = make_config(tmp_path, *LARGE, "train.max_steps=3", "train.checkpoint_every=2")
    run_training(config)
    (tmp_path / "checkpoints" / "step-3" / "COMPLETE").unlink()

    def rounded_otherwise(*arguments: object) -> Validated:
        found = validate(*arguments)  # type: ignore[arg-type]
        return replace(found, metrics={**found.metrics, "val/loss": found.metrics["val/loss"] * 0.9999})

    monkeypatch.setattr(loop, "validate", rounded_otherwise)
    before = (tmp_path / "checkpoints" / "best-3" / "COMPLETE").stat()
    run_training(config)
    assert (tmp_path / "checkpoints" / "best-3" / "COMPLETE").stat() == before
    assert steps(tmp_path) == [2, 3]
    assert last_checkpoint(tmp_path).position.step == 3


class Messages:
    """Messages between ranks, in one process."""

    def __init__(self, **known: str) -> None:
        self.known = {name.replace("_", "/"): text for name, text in known.items()}

    def put(self, name: str, text: str) -> None:
        self.known[name] = text

    def get(self, name: str) -> str | None:
        return self.known.get(name)


def snapshot() -> saving.Snapshot:
    position = Position(4, None, "0" * 64, 2)
    return saving.Snapshot(False, True, position, TrainState({}, {}, 4), [], 0.0, 0.0)


@pytest.mark.parametrize("theirs", ["failed", "stored"])
def test_logs_that_another_rank_cannot_store_are_not_waited_for(
    theirs: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(saving, "save_checkpoint", lambda storage, name, *rest: written.append(name))
    messages = Messages(logs_4_1=theirs)
    run, main = RunFolder(str(tmp_path), 10), World(0, 2, torch.device("cpu"))
    saver = saving.Saver(run, main, make_config(tmp_path), messages, None)  # type: ignore[arg-type]
    saver.submit(snapshot())
    assert saver.wait() is None
    assert written == (["step-4"] if theirs == "stored" else [])
    saver.close()


def test_a_rank_that_cannot_store_its_logs_says_so(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: RunFolder, **options: bool) -> None:
        raise UserError("the store refuses")

    monkeypatch.setattr(RunFolder, "sync", refuse)
    messages = Messages()
    run, other = RunFolder(str(tmp_path), 10), World(1, 2, torch.device("cpu"))
    saver = saving.Saver(run, other, make_config(tmp_path), messages, None)  # type: ignore[arg-type]
    saver.submit(snapshot())
    assert isinstance(saver.wait(), UserError)
    assert saver.failed
    assert messages.known == {"logs/4/1": "failed"}
    saver.close()
