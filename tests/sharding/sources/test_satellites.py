"""Products of Sentinel-2 and in DIMAP become samples on the command line, with the values that were written."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rasterio.transform import Affine

from cluster.cli import main
from sharding.errors import UnusableError
from sharding.format.index import SPLITS, Index
from sharding.format.sample import Sample, fetch_sample
from sharding.prepare.options import SampleOptions
from sharding.prepare.sample import make_sample
from sharding.sources.options import SourceOptions
from sharding.sources.scenes.source import ScenesSource
from sharding.storage import open_storage
from tests.sharding.sources.satellites import DATES, write_dimap, write_satellites
from tests.sharding.sources.sensors import EAST, NORTH

SIDE = 240
HOLE = (slice(40, 56), slice(80, 120))
"""Rows and columns of a target that hold no data."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[NDArray[np.float32]]]:
    folder = tmp_path_factory.mktemp("satellites") / "in"
    images = write_satellites(folder, 3, side=SIDE)
    values = np.round(images[2] * 10_000).astype(np.uint16)
    values[:, *HOLE] = 0
    (metadata,) = (folder / "site2").glob("*PMS*/DIM_*.XML")
    shutil.rmtree(metadata.parent)
    place = Affine(2.5, 0, EAST + 40_000, 0, -2.5, NORTH)
    write_dimap(metadata.parent, values, place, ids=("B2", "B1", "B0", "B3"), tiles=(3, 2))
    return folder, images


def samples(uri: Path) -> tuple[Index, dict[str, Sample]]:
    storage = open_storage(uri)
    index = Index.load(storage)
    found = [fetch_sample(storage, shard, entry) for split in SPLITS for shard, entry in index.samples(split)]
    return index, {sample.aoi: sample for sample in found}


def test_products_become_samples_with_their_values(
    world: tuple[Path, list[NDArray[np.float32]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, images = world
    assert main(["describe", str(folder)]) == 0
    draft = capsys.readouterr().out
    told = tomllib.loads(draft)
    assert told["pan"]["files"] == "{scene}/IMG_PHR1A_P_001/DIM_PHR1A_P_{date}1045123_ORT_5678.XML"
    assert told["target"]["files"] == "{scene}/IMG_PHR1A_PMS_001/DIM_PHR1A_MS_{date}1045123_ORT_5678.XML"
    assert told["revisits"]["files"] == "{scene}/S2B_MSIL2A_{date}T104621_N0{revisit}"
    assert "?" not in draft.replace("with a question mark", "").split("\n", 2)[2], "nothing is open"
    assert "processing baseline 02.12, processing baseline 04.00, processing baseline 05.09" in draft
    (folder / "scenes.toml").write_text(draft)
    arguments = ["--source", "scenes", "--input", str(folder), "--output", str(tmp_path / "out"), "--revisits", "3"]
    assert main(["shard", *arguments, "--workers", "1"]) == 0
    lines = capsys.readouterr().out
    assert "mixed, and each is converted by its own offset: processing baseline 02.12 (offset 0), processing" in lines
    index, found = samples(tmp_path / "out")
    assert index.facts.bands.lr == index.facts.bands.hr == ("blue", "green", "red", "nir")
    assert index.facts.ratio == (4, 1)
    assert index.facts.masks == ("clm", "valid")
    assert [entry.aoi for _, entry in index.samples("train")] == ["site2"], "the one with the hole"
    least = index.statistics["hr"]["min"]
    land = np.round(images[2][[2, 1, 0, 3]] * 10_000) / 10_000
    land[:, *HOLE] = np.inf
    np.testing.assert_allclose(least, land.min(axis=(1, 2)), atol=1.6e-5, err_msg="0 is no value")
    for number, image in enumerate(images):
        sample = found[f"site{number}"]
        wanted = np.round(image[[2, 1, 0, 3]] * 10_000) / 10_000
        valid = np.ones((1, SIDE, SIDE), np.uint8)
        if number == 2:
            wanted[:, *HOLE], valid[0, *HOLE] = 0, 0
        np.testing.assert_allclose(sample.hr * 3e-5, wanted, atol=1.6e-5)
        assert sample.valid is not None
        np.testing.assert_array_equal(sample.valid, valid)
        mean = image[[2, 1, 0, 3]].reshape(4, SIDE // 4, 4, SIDE // 4, 4).mean(axis=(2, 4))
        for visit in range(3):
            np.testing.assert_allclose(sample.lr[visit] * 3e-5, mean, atol=2e-3)
        cloudy = np.zeros((SIDE // 4, SIDE // 4), np.uint8)
        cloudy[:20, :20] = 1
        np.testing.assert_array_equal(sample.clm[:, 0], [cloudy * 0, cloudy, cloudy * 0])
        assert [revisit["date"] for revisit in sample.meta["revisits"]] == [day for day, *_ in DATES]  # type: ignore[attr-defined]
        assert sample.meta["hr_date"] == "2022-05-12"
        assert sample.meta["radiometry"]["hr"] == {"scale": 1e-4, "offset": 0.0, "nodata": 0.0}  # type: ignore[index]
        assert sample.meta["offsets"] == [0.0, -0.1, -0.1]
        assert sum("MTD_MSIL2A.xml" in name for name in sample.meta["sources"]) == 3  # type: ignore[attr-defined]
    assert main(["verify", str(tmp_path / "out"), "--deep", "--input", str(folder), "--num-aois", "3"]) == 0


def test_revisits_that_name_no_scene_belong_to_all(
    world: tuple[Path, list[NDArray[np.float32]]], tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(world[0], folder)
    (folder / "scenes.toml").unlink(missing_ok=True)
    (folder / "s2").mkdir()
    for path in sorted((folder / "site0").glob("S2*")):
        path.rename(folder / "s2" / path.name)
    for number in (1, 2):  # their land is the first scene's
        for kind in ("IMG_PHR1A_P_001", "IMG_PHR1A_PMS_001"):
            shutil.rmtree(folder / f"site{number}" / kind)
            shutil.copytree(folder / "site0" / kind, folder / f"site{number}" / kind)
        for path in sorted((folder / f"site{number}").glob("S2*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "scenes.toml").write_text(
        '[revisits]\nfiles = "s2/S2*_{date}T*"\n[pan]\nfiles = "{scene}/*_P_*/DIM_*.XML"\n'
        '[target]\nfiles = "{scene}/*_PMS_*/DIM_*.XML"\n'
    )
    arguments = ["--source", "scenes", "--input", str(folder), "--output", str(tmp_path / "out"), "--revisits", "3"]
    report = tmp_path / "report.json"
    split = ["--split-by", "block", "--block-km", "0.2", "--tile", "80"]
    assert main(["shard", *arguments, *split, "--workers", "1", "--report", str(report)]) == 0
    assert json.loads(report.read_text())["skipped"] == {}
    _, found = samples(tmp_path / "out")
    assert {name.partition("_")[0] for name in found} == {"site0", "site1", "site2"}
    first, second = (found[f"site{number}_x0_y0"] for number in (0, 1))
    np.testing.assert_array_equal(first.lr, second.lr)


def test_a_target_and_a_pan_without_common_data_are_skipped(
    world: tuple[Path, list[NDArray[np.float32]]], tmp_path: Path
) -> None:
    folder = tmp_path / "site0"
    shutil.copytree(world[0] / "site0", folder)
    values = np.round(world[1][0] * 10_000).astype(np.uint16)
    place = Affine(2.5, 0, EAST, 0, -2.5, NORTH)
    for kind, ids, empty in (("PMS", ("B2", "B1", "B0", "B3"), slice(0, 120)), ("P", ("P",), slice(120, 240))):
        shutil.rmtree(folder / f"IMG_PHR1A_{kind}_001")
        image = values[: len(ids)].copy()
        image[:, empty] = 0
        write_dimap(folder / f"IMG_PHR1A_{kind}_001", image, place, ids=ids)
    (folder / "scenes.toml").write_text(
        '[revisits]\nfiles = "S2*_{date}T*"\n[pan]\nfiles = "*_P_*/DIM_*.XML"\n[target]\nfiles = "*_PMS_*/DIM_*.XML"\n'
    )
    options = SampleOptions(revisits=3, lr_size=None, hr_size=None)
    (tile,) = ScenesSource(folder, options, SourceOptions(source="scenes")).scenes
    with pytest.raises(UnusableError, match="no-data: no pixel has data in both its target and its PAN"):
        make_sample(tile, options)
