"""Prediction of a user's GeoTIFFs: whole scenes in their place, with or without a target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from models.config import ModelConfig
from models.registry import build_model
from pipeline.prediction import Fusion
from pipeline.prediction.inputs import FoundInputs, find_inputs
from pipeline.prediction.predict import Predictor
from sharding.errors import UserError
from sharding.prepare.options import SampleOptions
from sharding.storage import open_storage
from tests.sharding.sources.sensors import EAST, NORTH, RGBN_TOML, write_rgbn

UNSIZED = SampleOptions(revisits=2, lr_size=None, hr_size=None)
SIDE = 160


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of two scenes of four bands at a ratio of 4, without a target."""
    write_rgbn(tmp_path / "in", 2, side=SIDE, dates=2)
    for target in (tmp_path / "in").rglob("ms.tif"):
        target.rename(tmp_path / f"{target.parent.name}-ms.tif")
    (tmp_path / "in" / "mine.toml").write_text(RGBN_TOML.partition("[target]")[0])
    (tmp_path / "in" / "scenes.toml").unlink()
    return tmp_path / "in"


def found_in(path: Path) -> FoundInputs:
    return find_inputs(str(path), SampleOptions, lambda: UNSIZED)


def test_a_whole_scene_without_target_becomes_a_geotiff_on_the_grid_of_pan(folder: Path, tmp_path: Path) -> None:
    inputs = found_in(folder / "mine.toml")
    assert (inputs.facts.bands.lr, inputs.facts.ratio) == (("red", "green", "blue", "nir"), (4, 1))
    torch.manual_seed(0)
    network = build_model(ModelConfig("srcnn", "pnn", bands=4, revisits=2, hidden=8))
    inputs.check_fits(network.config)
    fusion = Fusion.of(network, "tiny", window=20)
    report = Predictor(fusion, inputs.scenes, open_storage(tmp_path / "out")).predict()
    assert (report.made, report.skipped) == (["scene0", "scene1"], [])
    scene = inputs.scenes[0].read()
    with rasterio.open(tmp_path / "out" / "scene0.tif") as fused, rasterio.open(folder / "scene0" / "pan.tif") as pan:
        assert fused.crs == pan.crs == "EPSG:32631"
        assert fused.descriptions == ("red", "green", "blue", "nir")
        # A window of PAN's own pixels: not a tile, and at most the land that revisits moved by 4 m do not show.
        left, top = (fused.transform.c - EAST) / 2.5, (NORTH - fused.transform.f) / 2.5
        assert (left, top) == (int(left), int(top))
        assert SIDE - 8 <= min(fused.shape) <= max(fused.shape) <= SIDE
        rows, columns = slice(int(top), int(top) + fused.height), slice(int(left), int(left) + fused.width)
        np.testing.assert_allclose(scene.pan[0] * scene.step, pan.read(1)[rows, columns] * 1e-4, atol=2e-5)
        expected = fusion.predict(scene.lr, scene.pan, revisit=scene.clearest, step=scene.step)
        read = fused.read() * 1e-4
        np.testing.assert_allclose(read[read > 0], expected.clip(1e-4)[read > 0], atol=1.01e-4)
        assert (read > 0).mean() > 0.9
    assert scene.lr.shape == (2, 4, scene.pan.shape[1] // 4, scene.pan.shape[2] // 4)


def test_a_target_changes_nothing_where_it_covers_the_scene(folder: Path, tmp_path: Path) -> None:
    without = found_in(folder / "mine.toml").scenes[0].read()
    for number in range(2):
        (tmp_path / f"scene{number}-ms.tif").rename(folder / f"scene{number}" / "ms.tif")
    (folder / "scenes.toml").write_text(RGBN_TOML)
    beside = found_in(folder).scenes[0].read()  # of the folder's own scenes.toml
    assert without.digest() == beside.digest()


def test_listed_scenes_need_no_target(folder: Path) -> None:
    head = RGBN_TOML.partition("[target]")[0].replace('files = "{scene}/lr_{date}.tif"\n', "")
    listed = '[[scene]]\nname = "one"\nrevisits = ["scene1/lr_2020-05-11.tif", "scene1/lr_2020-06-11.tif"]\n'
    head = head.replace('files = "{scene}/pan.tif"\n', "")
    (folder / "listed.toml").write_text(f'{head}{listed}pan = "scene1/pan.tif"\n')
    (scene,) = found_in(folder / "listed.toml").scenes
    assert scene.aoi == "one"
    by_pattern = found_in(folder / "mine.toml").scenes[1].read()
    assert np.array_equal(scene.read().lr, by_pattern.lr)
    (folder / "listed.toml").write_text(head + listed)
    with pytest.raises(UserError, match=r"a \[\[scene\]\] lacks pan: each needs name, revisits, pan$"):
        found_in(folder / "listed.toml")


def test_what_cannot_be_fused_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml is missing"):
        found_in(folder / "none.toml")
    for pan in folder.rglob("pan.tif"):
        pan.unlink()
    with pytest.raises(UserError, match=r"pan\.files = '\{scene\}/pan\.tif' matches no file"):
        found_in(folder / "mine.toml")
