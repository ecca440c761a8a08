"""Whole scenes: equal to chips where one window counts, without seams, of any size, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.config import ModelConfig
from models.registry import all_pairs, build_model
from pipeline.config import DataConfig
from pipeline.data import ChipDataset
from pipeline.prediction import Fusion
from pipeline.prediction.windows import plan_axis
from sharding.errors import UserError
from sharding.format.sample import Sample, fetch_sample

Image = NDArray[np.float32]
ROOT = Path(__file__).parents[3]


def make_fusion(pair: tuple[str, str], window: int = 50) -> Fusion:
    torch.manual_seed(1)
    network = build_model(ModelConfig(*pair, revisits=2, hidden=8))
    network.at_step(network.config.kernel_freeze_step)
    made = Fusion.of(network, "test", device=torch.device("cpu"))
    return Fusion(made.network, made.name, made.digest, window=window)


@pytest.fixture(scope="module")
def sample(small_uri: str) -> Sample:
    dataset = ChipDataset(small_uri, "test", DataConfig())
    return fetch_sample(dataset.storage, *dataset.index.samples("test")[0])


def as_reflectance(sample: Sample) -> tuple[Image, Image]:
    step = np.float32(3e-5)
    return sample.lr * step, sample.pan * step


@pytest.mark.parametrize("pair", [("srcnn", "pnn"), ("none", "pannet")])
def test_where_one_window_counts_it_equals_the_chip(pair: tuple[str, str], small_uri: str, sample: Sample) -> None:
    fusion = make_fusion(pair)
    dataset = ChipDataset(small_uri, "test", DataConfig())
    clearest = int(sample.meta["clearest"])  # type: ignore[call-overload]
    whole = fusion.predict(sample.lr, sample.pan, revisit=clearest, step=3e-5)
    alone = {0: np.s_[:, :40, :40], 8: np.s_[:, -40:, -40:], 4: np.s_[:, 98:102, 98:102]}
    for chip, place in alone.items():
        batch = dataset.evaluation_batch(chip)
        with torch.no_grad():
            fused = fusion.network(batch.lr, batch.pan, batch.revisit).fused[0].numpy()
        hr = np.zeros_like(whole)
        column, row = divmod(chip, 3)
        first_row, first_column = round(row * 50 * 4 / 3), round(column * 50 * 4 / 3)
        hr[:, first_row : first_row + 67, first_column : first_column + 67] = fused[
            :, : 200 - first_row, : 200 - first_column
        ]
        assert np.abs(whole[place] - hr[place]).max() <= 1e-5


def seam_ratio(fusion: Fusion, lr: Image, pan: Image) -> float:
    """Return the RMS difference of two predictions near window borders, relative to elsewhere.

    Their grids are a quarter of a window apart. Grids half a window apart would be the same one: that is the stride.
    """
    offset = fusion.window // 4
    difference = fusion.predict(lr, pan) - fusion.predict(lr, pan, offset=offset)
    near = []
    for axis in (-2, -1):
        length = pan.shape[axis]
        mask = np.zeros(length, bool)
        for grid in (0, offset):
            for window in plan_axis(lr.shape[axis], length, fusion.window, grid):
                for edge in (window.hr_start, window.hr_stop):
                    mask[max(0, edge - 2) : edge + 2] = True
        near.append(mask)
    inner = np.s_[len(near[0]) // 5 : -len(near[0]) // 5, len(near[1]) // 5 : -len(near[1]) // 5]
    borders = (near[0][:, None] | near[1])[inner]
    squared = (difference**2).mean(axis=0)[inner]
    assert 0.1 < borders.mean() < 0.9
    return float(np.sqrt(squared[borders].mean() / squared[~borders].mean()))


@pytest.mark.parametrize("pair", [("srcnn", "pnn"), ("none", "pannet"), ("highresnet", "none")])
def test_no_seam_is_seen(pair: tuple[str, str], sample: Sample) -> None:
    assert seam_ratio(make_fusion(pair), *as_reflectance(sample)) <= 1.05


@pytest.mark.slow
@pytest.mark.parametrize("pair", all_pairs(), ids="+".join)
def test_no_seam_of_any_model_is_seen(pair: tuple[str, str], sample: Sample) -> None:
    # The training's windows: a frame of smaller ones is narrower than what a network sees around a pixel.
    lr, pan = as_reflectance(sample)
    assert seam_ratio(make_fusion(pair), lr[..., :100, :100], pan[..., :133, :133]) <= 1.05


def test_windows_cut_at_their_borders_would_be_seen(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(size: int, *, rises: bool, falls: bool) -> NDArray[np.float64]:
        return np.ones(size)

    monkeypatch.setattr("pipeline.prediction.windows._ramp", flat)
    assert seam_ratio(make_fusion(("srcnn", "pnn")), *as_reflectance(sample)) > 1.05


@pytest.mark.parametrize(("rows", "columns"), [(30, 30), (30, 70), (100, 7)])
def test_a_scene_smaller_than_a_window_is_mirrored(rows: int, columns: int, sample: Sample) -> None:
    lr, pan = as_reflectance(sample)
    lr, pan = lr[..., :rows, :columns], pan[..., : 2 * rows, : 2 * columns]
    fused = make_fusion(("srcnn", "pnn")).predict(lr, pan)
    assert fused.shape == (3, 2 * rows, 2 * columns)
    assert np.isfinite(fused).all()


@pytest.mark.parametrize(
    ("lr", "pan", "words"),
    [
        ((2, 4, 50, 50), (1, 156, 156), "weights of 3 bands"),
        ((2, 3, 50, 50), (2, 156, 156), r"pan must be \[1, H, W\]"),
        ((2, 3, 0, 50), (1, 156, 156), "must have pixels"),
        ((0, 3, 50, 50), (1, 156, 156), "must have pixels"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(lr: tuple[int, ...], pan: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_fusion(("srcnn", "pnn")).predict(np.zeros(lr, np.float32), np.zeros(pan, np.float32))


LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from models.registry import build_model
from pipeline.config import load_config
from pipeline.prediction import Fusion
from sharding.rasters.cog import RasterFacts, write_cog

folder, side = Path(sys.argv[1]), 10_000
network = build_model(load_config("demo").model)
fusion = Fusion.of(network, "large", device=torch.device("cpu"))
lr = np.memmap(folder / "lr", np.uint16, "w+", shape=(8, 3, side * 8 // 25, side * 8 // 25))
pan = np.memmap(folder / "pan", np.uint16, "w+", shape=(1, side, side))
pan[:] = 3000
facts = RasterFacts(side, side, ("red", "green", "blue"), "EPSG:32632", (1.5, 0, 0, 0, -1.5, 0))
rows = 0
with write_cog(folder / "large.tif", facts) as raster:
    for band in fusion.stream(lr, pan, step=3e-5):
        raster.write(band, np.ones(band.shape[-2:], bool))
        rows += band.shape[1]
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_large_scene_needs_little_memory(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows, kilobytes = map(int, ended.stdout.split())
    assert rows == 10_000
    assert kilobytes <= 2 << 20
