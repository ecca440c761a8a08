"""Chips of any geometry: native grids, samples smaller than a chip, rectangles, and other numbers of revisits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from models.config import ModelConfig
from pipeline.config import DataConfig
from pipeline.data.chips import Window, centred
from pipeline.data.dataset import ChipDataset
from sharding.errors import UserError
from sharding.format.sample import fetch_sample
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import shard_folder
from sharding.run.job import ShardOptions
from sharding.run.plan import PlanOptions
from sharding.sources.options import SourceOptions
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage
from tests.chips import training_chip
from tests.sharding.sources.sensors import write_hdf5, write_rgbn, write_tiff


def sharded(folder: Path, output: Path, sample: SampleOptions, source: SourceOptions) -> str:
    options = ShardOptions(sample, PlanOptions(), source)
    shard_folder(folder, open_storage(output), options, say=lambda line: None)
    return str(output)


def test_native_grids_train_and_each_window_shows_the_same_land(tmp_path: Path) -> None:
    write_worldstrat(tmp_path / "in", 4, 3, revisits=2, hr_side=500)
    native = SampleOptions(revisits=2, lr_size=None, hr_size=None)
    uri = sharded(tmp_path / "in", tmp_path / "out", native, SourceOptions())
    dataset = ChipDataset(uri, "train", DataConfig())
    heights, widths = zip(*(entry.layout["lr"].shape[-2:] for _, entry in dataset._all_samples()), strict=True)
    assert len(set(heights)) > 1
    assert dataset.grid.size == 50
    assert dataset.lr_size == (min(heights), min(widths))
    assert dataset.scale == pytest.approx(500 / 75, rel=0.05)
    dataset.check_fits(ModelConfig("srcnn", "pnn", revisits=2))
    for chip in range(dataset.num_chips):
        batch = dataset[chip]
        assert batch.lr.shape == (1, 2, 3, 50, 50)
        side = batch.hr.shape[-1]
        assert side == round(50 * dataset.scale)
        small = torch.nn.functional.interpolate(batch.hr, (50, 50), mode="bilinear", antialias=True)
        images = [image[0, :, 5:-5, 5:-5].ravel().numpy() for image in (batch.lr[:, 0], small)]
        assert np.corrcoef(*images)[0, 1] > 0.7


def test_a_native_window_has_the_middle_of_its_lr_window() -> None:
    window = Window(x=50, y=0, size=50, hr_x=0, hr_y=0, hr_size=330)
    moved = centred(window, (158, 153), (1054, 1054))
    assert moved.hr_x + 165 == pytest.approx(75 * 1054 / 153, abs=0.5)
    assert moved.hr_y + 165 == pytest.approx(25 * 1054 / 158, abs=0.5)
    assert centred(Window(103, 108, 50, 0, 0, 350), (158, 153), (1054, 1054))[3:] == (704, 704, 350)


@pytest.mark.parametrize("windows", [False, True])
def test_small_rectangles_of_four_bands(tmp_path: Path, windows: bool) -> None:
    write_rgbn(tmp_path / "in", 3, side=120, dates=2)
    source = SourceOptions(source="scenes", chip=10)
    uri = sharded(tmp_path / "in", tmp_path / "out", SampleOptions(revisits=2), source)
    dataset = ChipDataset(uri, "train", DataConfig(random_windows=windows))
    shapes = {entry.layout["lr"].shape[-2:] for _, entry in dataset._all_samples()}
    assert min(min(shape) for shape in shapes) >= 20
    assert (dataset.grid.size, dataset.scale) == (10, 4)
    assert dataset.chips_per_scene == 4
    shard, entry = dataset.index.samples("train")[0]
    sample = fetch_sample(dataset.storage, shard, entry)
    batch = dataset[1]
    assert np.allclose(batch.hr[0].numpy(), sample.hr[:, 40:80, :40] * np.float32(3e-5))
    assert np.allclose(batch.lr[0].numpy(), sample.lr[:, :, 10:20, :10] * np.float32(3e-5))
    for chip in range(dataset.num_chips):
        assert training_chip(dataset, chip, 1, 2).hr.shape == (1, 4, 40, 40)


def test_a_model_of_other_bands_is_refused_before_any_work(tmp_path: Path) -> None:
    write_rgbn(tmp_path / "in", 3, side=60, dates=2)
    source = SourceOptions(source="scenes")
    uri = sharded(tmp_path / "in", tmp_path / "out", SampleOptions(revisits=2), source)
    dataset = ChipDataset(uri, "train", DataConfig())
    assert dataset.chips_per_scene == 1
    with pytest.raises(UserError, match=r"holds 4 bands: set model\.bands=4"):
        dataset.check_fits(ModelConfig("srcnn", "pnn", revisits=2))
    with pytest.raises(UserError, match=r"set model\.revisits=2"):
        dataset.check_fits(ModelConfig("srcnn", "pnn", bands=4))


def test_more_revisits_are_simulated_than_stored(tmp_path: Path) -> None:
    for number, name in enumerate(("train_gf2.h5", "val_gf2.h5", "test_gf2.h5")):
        write_hdf5(tmp_path / "in" / name, 1, bands=4, bits=10, seed=number)
    source = SourceOptions(source="pancollection")
    uri = sharded(tmp_path / "in", tmp_path / "out", SampleOptions(), source)
    dataset = ChipDataset(uri, "train", DataConfig(simulate="sensor", simulated_revisits=3))
    dataset.check_fits(ModelConfig("srcnn", "pnn", bands=4, revisits=3))
    batch = dataset[0]
    assert batch.lr.shape == (1, 3, 4, 64, 64)
    assert not torch.equal(batch.lr[0, 0], batch.lr[0, 1])
    assert ChipDataset(uri, "train", DataConfig())[0].lr.shape == (1, 1, 4, 64, 64)


def test_fewer_revisits_are_simulated_than_stored(tmp_path: Path) -> None:
    write_rgbn(tmp_path / "in", 3, side=120, dates=2)
    for path in (tmp_path / "in").glob("*/lr_*.tif"):  # the second revisit is the clearest
        with rasterio.open(path) as file:
            cloud = np.full((1, file.height, file.width), "05-11" in path.name, np.uint8)
            write_tiff(path.with_name(path.name.replace("lr", "clm")), cloud, file.transform, file.crs)
    with (tmp_path / "in" / "scenes.toml").open("a") as text:
        text.write('[masks]\nfiles = "{scene}/clm_{date}.tif"\n')
    uri = sharded(tmp_path / "in", tmp_path / "out", SampleOptions(revisits=2), SourceOptions(source="scenes"))
    stored = ChipDataset(uri, "test", DataConfig())[0]
    assert stored.revisit.tolist() == [1]
    simulated = ChipDataset(uri, "test", DataConfig(simulate="sensor", simulated_revisits=1))[0]
    assert simulated.lr.shape[:2] == (1, 1)
    assert simulated.revisit.tolist() == [0]
