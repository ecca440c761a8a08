"""Exported weights: equal outputs without `pipeline` and `sharding`, and refusals of what is damaged."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.config import ModelConfig
from models.exported import load_exported, to_exported
from models.registry import all_pairs, build_model
from pipeline.config import RunConfig
from pipeline.networks import load_network
from pipeline.prediction.export import export_run, make_program
from pipeline.training.checkpoint import read_checkpoint
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.errors import UserError
from sharding.storage import LocalStorage, open_storage
from tests.in_process import run_here
from tests.pipeline.test_cli import refused, satfusion

ROOT = Path(__file__).parents[3]

ALONE = """
import sys
for package in ("pipeline", "sharding", "cluster", "rasterio", "ray", "deepspeed", "boto3", "webdataset", "PIL"):
    sys.modules[package] = None
import numpy as np
import torch
from models.exported import load_exported
images = np.load(sys.argv[2])
with torch.no_grad():
    fused = load_exported(sys.argv[1])(*(torch.from_numpy(images[name]) for name in ("lr", "pan", "revisit"))).fused
np.save(sys.argv[3], fused.numpy())
"""


@pytest.fixture(scope="module")
def run(world: World, make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    run_training(make_config(folder, "train.max_steps=2", "train.checkpoint_every=2"))
    return str(folder)


def test_weights_alone_give_the_same_image(run: str, tmp_path: Path) -> None:
    ended = satfusion("export", run, "--to", str(tmp_path / "out"), "--checkpoint", "last", "--program")
    assert ended.returncode == 0, ended.stderr
    network = load_network(read_checkpoint(open_storage(run), "step-2")).eval()
    lr, pan, revisit = torch.rand(3, 2, 3, 50, 50), torch.rand(3, 1, 67, 67), torch.tensor([0, 1, 0])
    with torch.no_grad():
        expected = network(lr, pan, revisit).fused
    np.savez(tmp_path / "images.npz", lr=lr.numpy(), pan=pan.numpy(), revisit=revisit.numpy())
    subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "out", tmp_path / "images.npz", tmp_path / "fused.npy"],
        cwd=ROOT,
        check=True,
    )
    assert np.abs(np.load(tmp_path / "fused.npy") - expected.numpy()).max() <= 1e-6
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert (program(lr, pan, revisit) - expected).abs().max() <= 1e-6
    facts = json.loads((tmp_path / "out" / "model.json").read_text())["facts"]
    assert facts["ratio"] == pytest.approx(200 / 150)
    assert (facts["lr_window"], facts["hr_window"], facts["program_chips"]) == (50, 67, None)
    assert "srcnn+pnn" in (tmp_path / "out" / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("pair", [("trnet", "arconv"), ("rams", "none"), ("none", "innformer")], ids="+".join)
def test_models_come_back_as_they_were(pair: tuple[str, str], tmp_path: Path) -> None:
    network = build_model(ModelConfig(*pair, revisits=2, hidden=8, padding="replicate")).eval()
    network.at_step(1000)
    for name, content in to_exported(network, 1000, {}).items():
        (tmp_path / name).write_bytes(content)
    again = load_exported(tmp_path)
    images = torch.rand(1, 2, 3, 12, 12), torch.rand(1, 1, 20, 20)
    with torch.no_grad():
        assert torch.equal(again(*images).fused, network(*images).fused)
    assert again.config == network.config


@pytest.mark.slow
@pytest.mark.parametrize("pair", all_pairs(), ids="+".join)
def test_programs_of_all_models(pair: tuple[str, str]) -> None:
    network = build_model(ModelConfig(*pair, revisits=2, hidden=8)).eval()
    network.at_step(network.config.kernel_freeze_step)
    _, chips = make_program(network, 10, 31)
    # The number of chips is fixed by attention over tokens of all chips, and by the scan's blocks.
    assert chips == (1 if {"trnet", "trnet_pan", "innformer", "pan_mamba"} & set(pair) else None)


def test_names_from_outside_are_escaped(run: str, tmp_path: Path) -> None:
    ended = run_here("export", run, "--to", str(tmp_path / "red\x1b[31m"))
    assert ended.returncode == 0, ended.stderr
    assert f"written to {tmp_path}/red\\x1b[31m: MODEL_CARD.md" in ended.stdout


def test_exports_are_replaced_on_request_only(run: str, tmp_path: Path) -> None:
    satfusion("export", run, "--checkpoint", "last", "--to", str(tmp_path / "out"), "--program")
    with pytest.raises(UserError, match="holds another export: give --overwrite"):
        export_run(run, "last", str(tmp_path / "out"))
    export_run(run, "last", str(tmp_path / "out"), overwrite=True)
    export_run(run, "last", str(tmp_path / "out"))  # the same once more
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"MODEL_CARD.md", "model.json", "model.safetensors"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "MODEL_CARD.md").write_text("of mine")
    sentence = refused("export", run, "--to", str(tmp_path / "mine"), "--overwrite")
    assert "MODEL_CARD.md was not written by export" in sentence
    for text in ("[" * 100_000, '{"format_version": 1, "model": {}, "sha256": "0"}', "{"):
        (tmp_path / "mine" / "model.json").write_text(text)
        with pytest.raises(UserError, match="was not written by export: name another folder"):
            export_run(run, "last", str(tmp_path / "mine"), overwrite=True)
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"MODEL_CARD.md", "model.json"}


def test_an_edited_card_is_replaced_on_request_only(run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, card = str(tmp_path / "out"), tmp_path / "out" / "MODEL_CARD.md"
    export_run(run, "last", folder)
    original = card.read_text()
    export_run(run, "last", folder)
    assert "MODEL_CARD.md" not in caplog.text
    card.write_text(original + "Trained for the harbour.\n")
    _, names = export_run(run, "last", folder)
    assert names == ["model.json", "model.safetensors"]
    assert card.read_text() == original + "Trained for the harbour.\n"
    assert "MODEL_CARD.md differs from the card of this export and is kept: give --overwrite" in caplog.text
    export_run(run, "last", folder, overwrite=True)
    assert card.read_text() == original


def test_damaged_exports_are_refused(run: str, tmp_path: Path) -> None:
    folder, _ = export_run(run, "last", str(tmp_path / "out"))
    table = json.loads((Path(folder) / "model.json").read_text())
    large = {**table, "model": {**table["model"], "hidden": 1 << 14}}
    huge = {**table, "model": {**table["model"], "hidden": 4 << 40}}
    typed = {**table, "model": {**table["model"], "hidden": "8"}}
    for number, (content, words) in enumerate(
        [
            (json.dumps(large), "model.safetensors holds .+ and model.json needs"),
            (json.dumps(huge), "hidden = 4398046511104 is out of range"),
            (json.dumps(typed), "hidden = '8' is no int"),
            (json.dumps({**table, "format_version": 2}), "format version is 2"),
            (json.dumps({**table, "model": {"encodr": "srcnn"}}), "encodr"),
            ("[]", "is not the configuration of an exported model"),
        ]
    ):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        (copy / "model.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            load_exported(copy)
    (Path(folder) / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"is not the file that model\.json describes"):
        load_exported(folder)
    with pytest.raises(ValueError, match="No such file"):
        load_exported(tmp_path / "none")


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_an_interrupted_export_is_none_and_the_same_command_completes_it(
    kept: int, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = LocalStorage.write

    def interrupted(after: int) -> None:
        calls = itertools.count()

        def write(self: LocalStorage, key: str, data: bytes) -> None:
            if next(calls) == after:
                raise KeyboardInterrupt
            written(self, key, data)

        monkeypatch.setattr(LocalStorage, "write", write)

    def export(folder: str, checkpoint: str, *, overwrite: bool = False) -> None:
        export_run(run, checkpoint, str(tmp_path / folder), overwrite=overwrite)

    export("whole", "last")
    export("replaced", "best")
    for folder, overwrite in (("new", False), ("replaced", True)):
        interrupted(kept)
        with pytest.raises(KeyboardInterrupt):
            export(folder, "last", overwrite=overwrite)
        monkeypatch.undo()
        if folder == "new":
            with pytest.raises(ValueError, match=r"model\.json"):
                load_exported(tmp_path / folder)
        export(folder, "last", overwrite=overwrite)
        for path in (tmp_path / "whole").iterdir():
            assert (tmp_path / folder / path.name).read_bytes() == path.read_bytes()
