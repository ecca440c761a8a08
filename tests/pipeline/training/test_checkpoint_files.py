"""Checkpoints and records of runs that somebody changed by hand, or to do harm, end in one sentence."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import ModelConfig
from models.registry import build_model
from pipeline.config import RunConfig
from pipeline.engines.engine import MOMENTS, TrainState
from pipeline.training.checkpoint import Position, newest_checkpoint, read_checkpoint, save_checkpoint
from pipeline.world import World
from sharding.errors import UserError
from sharding.storage import open_storage
from tests.in_process import run_here
from tests.limits import limited_memory
from tests.mutations import damaged, mutated

GIB = 1 << 30
CONFIG = RunConfig(model=ModelConfig(hidden=4, revisits=2))
DIGEST = "0" * 64


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with a full checkpoint of step 6 and the best weights of step 4."""
    folder = tmp_path_factory.mktemp("run")
    network = build_model(CONFIG.model)
    weights = {name: value.detach() for name, value in (*network.named_buffers(), *network.named_parameters())}
    moments = {name: {moment: torch.ones_like(value) for moment in MOMENTS} for name, value in weights.items()}
    generators = [{"cpu": torch.get_rng_state()}]
    for name, step, kept in (("step-6", 6, moments), ("best-4", 4, {})):
        position = Position(step, 0.5, DIGEST, 1)
        save_checkpoint(open_storage(folder), name, CONFIG, position, TrainState(weights, kept, step), generators)
    return folder


def test_a_kernel_size_that_arconv_does_not_have_is_refused(tmp_path: Path) -> None:
    config = RunConfig(model=ModelConfig("none", "arconv", hidden=4, revisits=1))
    network = build_model(config.model)
    weights = {name: value.detach() for name, value in (*network.named_buffers(), *network.named_parameters())}
    name = next(name for name in weights if name.endswith("reserved_NXY"))
    runs, position = open_storage(tmp_path), Position(4, 0.5, DIGEST, 1)
    for kernel, whole in (([5, 7], True), ([4, 3], False), ([2**31 - 1, -1], False)):
        weights[name] = torch.tensor(kernel, dtype=torch.int32)
        save_checkpoint(runs, "best-4", config, position, TrainState(weights, {}, 4), [{"cpu": torch.get_rng_state()}])
        if whole:
            assert read_checkpoint(runs, "best-4").state.weights[name].tolist() == kernel
            continue
        with pytest.raises(UserError, match=r"state\.pt is damaged \(it holds weights of which") as caught:
            read_checkpoint(runs, "best-4")
        assert f"{name} = {kernel} is not a kernel size" in str(caught.value)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    return folder


def rewrite(run: Path, name: str, file: str, data: bytes) -> None:
    """Replace a file of a checkpoint, and its line in the marker."""
    folder = run / "checkpoints" / name
    (folder / file).write_bytes(data)
    marker = json.loads((folder / "COMPLETE").read_bytes())
    marker[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "COMPLETE").write_text(json.dumps(marker))


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def each_weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], object]:
    return lambda state: {**state, "weights": {name: change(value) for name, value in state["weights"].items()}}


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch HARM_WAS_DONE",)


STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "pickled code": (lambda state: Harm(), "it holds no weights, moments and generators"),
    "code beside tensors": (lambda state: {**state, "generators": Harm()}, "no generator states of 1 ranks"),
    "no keys": (lambda state: {}, "it holds no weights, moments and generators"),
    "other names": (lambda state: {**state, "weights": {"x": torch.zeros(1)}}, "holds weights of other names"),
    "other shapes": (each_weight(lambda value: torch.zeros(3)), r"is torch.float32 \[3\] where torch.float32 \["),
    "other type": (each_weight(lambda value: value.double()), r"is torch.float64 .* where torch.float32 \["),
    "nan": (each_weight(lambda value: value * float("nan")), "has values that are not finite"),
    "expanded": (each_weight(lambda value: torch.zeros(1).expand(10**12)), "1000000000000. in a storage of 1 values"),
    "infinite moments": (
        lambda state: {
            **state,
            "moments": {n: {m: v / 0 for m, v in of.items()} for n, of in state["moments"].items()},
        },
        "holds moments of .* values that are not finite",
    ),
    "no moments": (lambda state: {**state, "moments": {}}, "moments of other parameters"),
    "no generators": (lambda state: {**state, "generators": []}, "holds no generator states of 1 ranks"),
    "generator of zeros": (
        lambda state: {**state, "generators": [{"cpu": torch.zeros(8, dtype=torch.uint8)}]},
        "generator states that are none",
    ),
    "generator of a planet": (lambda state: {**state, "generators": [{"mars": torch.zeros(1)}]}, "unknown devices"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_changed_state_is_refused(copy: Path, case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    change, words = STATES[case]
    state = torch.load(copy / "checkpoints/step-6/state.pt", weights_only=True)
    rewrite(copy, "step-6", "state.pt", saved(change(state)))
    with limited_memory(GIB), pytest.raises(UserError, match=words) as caught:
        read_checkpoint(open_storage(copy), "step-6")
    assert "state.pt is damaged (it " in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        newest_checkpoint(open_storage(copy))
    assert not Path("HARM_WAS_DONE").exists()


POSITIONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no config": (lambda record: record.pop("config"), "missing required field `config`"),
    "no position": (lambda record: record.pop("position"), "missing required field `position`"),
    "text step": (lambda record: record["position"].update(step="abc"), "position.step: expected `int`, got `str`"),
    "negative step": (lambda record: record["position"].update(step=-5), "position.step: expected `int` >= 0"),
    "another step": (lambda record: record["position"].update(step=7), "position.step: 7 is another step's"),
    "no rank": (lambda record: record["position"].update(world_size=0), "position.world_size: expected `int` >= 1"),
    "many ranks": (lambda record: record["position"].update(world_size=10**9), "no generator states of 1000000000"),
    "short digest": (lambda record: record["position"].update(index_digest="0"), "index_digest: expected `str`"),
    "huge width": (lambda record: record["config"]["model"].update(hidden=4 * 10**6), "hidden = 4000000 is out of"),
    "other width": (lambda record: record["config"]["model"].update(hidden=4096), r"where torch.float32 \[4096"),
    "list as width": (lambda record: record["config"]["model"].update(hidden=[4]), "hidden|config"),
    "unknown key": (lambda record: record["config"]["model"].update(hiden=4), "unknown key 'model.hiden'"),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_a_changed_position_is_refused(copy: Path, case: str) -> None:
    change, words = POSITIONS[case]
    record = json.loads((copy / "checkpoints/step-6/checkpoint.json").read_bytes())
    change(record)
    rewrite(copy, "step-6", "checkpoint.json", json.dumps(record).encode())
    with limited_memory(GIB), pytest.raises(UserError, match=words) as caught:
        read_checkpoint(open_storage(copy), "step-6")
    assert "checkpoints/step-6/" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_checkpoint_is_read(run: Path) -> None:
    full, best = (read_checkpoint(open_storage(run), name) for name in ("step-6", "best-4"))
    assert (full.position, best.position.step) == (Position(6, 0.5, DIGEST, 1), 4)
    assert full.state.moments.keys() == full.state.weights.keys()
    assert best.state.moments == {}
    assert torch.equal(full.generators[0]["cpu"], best.generators[0]["cpu"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "(input data was truncated)"),
        ('{"model": {}}', "object missing required field"),
        ('{"environment": {"index_digest": 5}}', "environment.index_digest: expected `str`, got `int`"),
    ],
)
def test_a_changed_record_of_a_run_is_refused(
    world: World, dataset_uri: str, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    ended = run_here("train", "demo", f"data.uri={dataset_uri}", f"output.uri={tmp_path}", "train.engine=torch")
    assert ended.returncode == 2
    assert f"satfusion: error: {tmp_path}/config.json is not a record of a run (" in ended.stderr
    assert words in ended.stderr


def check(run: Path, draw: random.Random) -> None:
    """Read a changed checkpoint; anything but a checkpoint or one sentence fails the test."""
    folder = run / "checkpoints/step-6"
    kept = {file: (folder / file).read_bytes() for file in ("state.pt", "checkpoint.json", "COMPLETE")}
    kind = draw.randrange(4)
    if kind == 0:
        rewrite(run, "step-6", "state.pt", damaged(kept["state.pt"], draw))
    elif kind == 1:
        changed = json.dumps(mutated(json.loads(kept["checkpoint.json"]), draw)).encode()
        rewrite(run, "step-6", "checkpoint.json", changed)
    elif kind == 2:
        rewrite(run, "step-6", "checkpoint.json", damaged(kept["checkpoint.json"], draw))
    else:
        (folder / "COMPLETE").write_text(json.dumps(mutated(json.loads(kept["COMPLETE"]), draw)))
    try:
        with limited_memory(GIB):
            read_checkpoint(open_storage(run), "step-6")
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 - one of many sentences
    for file, data in kept.items():
        (folder / file).write_bytes(data)


@given(st.integers(0, 2**64))
@settings(max_examples=60, deadline=None)
def test_any_change_of_a_checkpoint_ends_in_a_checkpoint_or_a_sentence(run: Path, seed: int) -> None:
    check(run, random.Random(seed))


@pytest.mark.slow
def test_thousands_of_changed_checkpoints_end_in_sentences(run: Path) -> None:
    for seed in range(2000):
        check(run, random.Random(seed))
