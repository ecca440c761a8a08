"""One training step in every form: late values, plain PyTorch, compiled, bands last, profiled."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.config import RunConfig, TrainConfig
from pipeline.engines.engine import use_tf32
from pipeline.reporting.events import CsvLog
from pipeline.training import loop as train
from pipeline.training.checkpoint import complete_checkpoints
from pipeline.training.loop import run_training
from pipeline.training.step_values import StepValues
from pipeline.world import World
from sharding.errors import UserError
from sharding.storage import open_storage
from tests.command import column, last_checkpoint

MakeConfig = Callable[..., RunConfig]


def losses(folder: Path) -> list[float]:
    return [float(value) for value in column(folder, "train/loss")]


@pytest.fixture(scope="module")
def usual(world: World, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Take six steps with the defaults."""
    folder = tmp_path_factory.mktemp("usual")
    run_training(make_config(folder, "train.max_steps=6"))
    return folder


def test_plain_pytorch_trains_the_same(usual: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    run_training(make_config(tmp_path, "train.max_steps=6", "train.engine=torch"))
    assert losses(tmp_path) == pytest.approx(losses(usual), rel=1e-6)
    own, theirs = last_checkpoint(tmp_path).state, last_checkpoint(usual).state
    for name, value in theirs.weights.items():
        torch.testing.assert_close(own.weights[name], value, rtol=1e-5, atol=1e-7)


def test_one_engine_resumes_what_the_other_began(usual: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    for steps, engine in ((3, "torch"), (6, "deepspeed")):
        run_training(make_config(tmp_path, f"train.max_steps={steps}", f"train.engine={engine}"))
    assert losses(tmp_path) == pytest.approx(losses(usual), rel=1e-6)


def test_values_that_come_late_are_the_same(
    usual: Path, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the host reads the values of a step while the next one is computed."""
    monkeypatch.setattr(train, "StepValues", lambda world, log_every: StepValues(world, log_every, lag=1))
    run_training(make_config(tmp_path / "whole", "train.max_steps=6"))
    assert losses(tmp_path / "whole") == losses(usual)
    assert column(tmp_path / "whole", "step") == ["1", "2", "3", "4", "5", "6"]
    diverging = ("train.learning_rate=1e30", "train.schedule=warm_restarts", "train.checkpoint_every=2")
    with pytest.raises(UserError, match=r"not finite at step 2 on rank 0; the global batch was .+/\d"):
        run_training(make_config(tmp_path / "diverging", "train.max_steps=9", *diverging))
    assert complete_checkpoints(open_storage(tmp_path / "diverging"), "step") == []
    assert column(tmp_path / "diverging", "step") == ["1"]


def test_bands_last_in_memory_change_rounding_alone(usual: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    run_training(make_config(tmp_path, "train.max_steps=6", "train.channels_last=true"))
    assert losses(tmp_path) == pytest.approx(losses(usual), rel=1e-4)
    assert all(value.is_contiguous() for value in last_checkpoint(tmp_path).state.weights.values())


def test_a_profile_is_a_trace_of_the_steps_asked_for(world: World, make_config: MakeConfig, tmp_path: Path) -> None:
    run_training(make_config(tmp_path, "train.max_steps=8", "train.profile=2"))
    with gzip.open(tmp_path / "events" / "rank-0" / "rank-0.pt.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events if "name" in event}
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#4", "ProfilerStep#5"}
    assert "aten::convolution" in names


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"engine": "torch", "zero_stage": 1}, "train.zero_stage = 1 .+ has no ZeRO"),
        ({"engine": "horovod"}, "train.engine = 'horovod' is not known"),
        ({"channels_last": True, "zero_stage": 2}, "train.channels_last = True .+ flatten the weights"),
        ({"compile": True, "zero_stage": 3}, "train.compile = True .+ layer by layer"),
        ({"profile": -1}, "train.profile = -1"),
    ],
)
def test_keys_that_exclude_each_other_are_refused(values: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        TrainConfig(**values)  # type: ignore[arg-type]


def test_tf32_is_off_unless_asked_for() -> None:
    """PyTorch's default allows it in convolutions, where golden cases would exceed their tolerance."""
    try:
        for enabled, name in ((True, "tf32"), (False, "ieee")):
            use_tf32(enabled)
            assert torch.backends.cuda.matmul.fp32_precision == name
            assert torch.backends.cudnn.conv.fp32_precision == name
    finally:
        use_tf32(False)


def test_a_row_of_the_log_is_the_mean_of_the_steps_since_the_last(
    usual: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    run_training(make_config(tmp_path, "train.max_steps=6", "train.log_every=2"))
    each = losses(usual)
    assert column(tmp_path, "step") == ["2", "4", "6"]
    assert losses(tmp_path) == pytest.approx([(each[i] + each[i + 1]) / 2 for i in (0, 2, 4)], rel=1e-9)


def test_a_csv_with_other_columns_keeps_every_row_by_name(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,old,before\n1,a,0.5\n2,b,0.25\n3,c\n9,d,0.1\n")
    log = CsvLog(path, ["step", "loss", "new"], last_step=8, renamed={"before": "loss"})
    log.row({"step": 3, "loss": 0.125, "new": "n"})
    log.close()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "loss": "0.5", "new": "", "old": "a"},
        {"step": "2", "loss": "0.25", "new": "", "old": "b"},
        {"step": "3", "loss": "0.125", "new": "n", "old": ""},
    ]
