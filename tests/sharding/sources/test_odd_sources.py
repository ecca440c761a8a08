"""Sources as people have them: saved by spreadsheets, copied by desktops, with an odd revisit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio

from sharding.errors import UnusableError, UserError
from sharding.format.sidecar import read_sidecar
from sharding.prepare.options import SampleOptions
from sharding.prepare.sample import make_sample
from sharding.run.dataset import shard_folder
from sharding.run.job import ShardOptions, _read_names
from sharding.run.planner import TooFewAoisError
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.sources.worldstrat.files import open_source
from sharding.sources.worldstrat.layout import SPLIT_FILE, AoiFiles, check_files, find_aois, read_split_file
from sharding.storage import LocalStorage

TWO = SampleOptions(revisits=2, lr_size=20, hr_size=40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_worldstrat(tmp_path / "in", 3, 7, revisits=3, hr_side=80)
    return tmp_path / "in"


def found(folder: Path) -> list[AoiFiles]:
    return find_aois(open_source(folder, "l2a"))


def change(folder: Path, pattern: str, crop: int, factor: float) -> None:
    for path in folder.glob(f"lr_dataset/*/L2A/{pattern}"):
        with rasterio.open(path) as file:
            pixels, profile = file.read(), dict(file.profile)
        pixels = (pixels[:, : pixels.shape[1] - crop] * factor).astype(pixels.dtype)
        path.unlink()
        with rasterio.open(path, "w", **profile | {"height": pixels.shape[1]}) as file:
            file.write(pixels)


@pytest.mark.parametrize(
    "text",
    [
        "\ufefftile,split\r\nA 1,train\r\nB-2,val\r\n",
        'tile;split\n"A 1";"train"\n B-2 ; val \n\n;\n',
        "n\ttile\tsplit\n0\tA 1\ttrain\n1\tB-2\tval\n",
        '"tile", "split"\n"A 1", "train"\nB-2 , val\n',
    ],
)
def test_a_split_file_of_a_spreadsheet_is_read(folder: Path, text: str) -> None:
    (folder / SPLIT_FILE).write_bytes(text.encode())
    assert read_split_file(open_source(folder, "l2a")) == [("A 1", "train"), ("B-2", "val")]


def test_a_split_file_that_is_a_folder_is_refused(folder: Path) -> None:
    (folder / SPLIT_FILE).mkdir()
    with pytest.raises(UserError, match=r"is a folder: give a regular file"):
        read_split_file(open_source(folder, "l2a"))


def test_a_list_of_aois_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "aois.csv"
    path.write_bytes("\ufeff\"A 1\";\r\n'B-2',\r\n\r\n C \r\n".encode())
    assert _read_names(str(path)) == ("A 1", "B-2", "C")


def test_folders_that_are_no_aois_do_not_count(folder: Path) -> None:
    before = found(folder)
    for name in ("hr_dataset/.ipynb_checkpoints", "lr_dataset/__MACOSX/x/L2A", "hr_dataset/@eaDir"):
        (folder / name).mkdir(parents=True)
    for path in list(folder.rglob("*.tiff")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert found(folder) == before


def test_rasters_may_end_in_tif(folder: Path) -> None:
    before = make_sample(found(folder)[0], TWO)
    for path in list(folder.rglob("*.tiff")):
        path.rename(path.with_suffix(".tif"))
    after = make_sample(found(folder)[0], TWO)
    assert all(np.array_equal(after.images[name], image) for name, image in before.images.items())


def test_an_aoi_without_any_cloud_mask_is_taken_and_one_that_lacks_some_is_not(folder: Path) -> None:
    masks = sorted(folder.glob("lr_dataset/*/L2A/*-CLM.tiff"))
    masks[0].unlink()
    flawed = next(aoi for aoi in found(folder) if masks[0].name.startswith(f"{aoi.name}-"))
    with pytest.raises(UnusableError, match=r"missing-file: .*-CLM\.tiff is missing"):
        check_files(flawed, TWO)
    for path in masks[1:]:
        path.unlink()
    for aoi in found(folder):
        check_files(aoi, TWO)
    assert (make_sample(found(folder)[0], TWO).images["clm"] == 255).all()


@pytest.mark.parametrize(("crop", "factor", "why"), [(1, 1.0, "size-mismatch: "), (0, 0.0, "no-data: revisit 1 is")])
def test_a_revisit_is_passed_over_where_enough_others_remain(folder: Path, crop: int, factor: float, why: str) -> None:
    change(folder, "*-1-L2A_data.tiff" if factor == 0 else "*-1-*.tiff", crop, factor)
    aoi = found(folder)[0]
    sample = make_sample(aoi, replace(TWO, revisits=2, select="clearest" if crop else "first"))
    assert [item["number"] for item in sample.meta["revisits"]] == [2, 3]  # type: ignore[attr-defined]
    (line,) = sample.passed
    assert line.startswith(why)
    with pytest.raises(UnusableError, match=why):
        make_sample(aoi, replace(TWO, revisits=3))


def test_a_new_revisit_saves_an_aoi_that_was_skipped(folder: Path, tmp_path: Path) -> None:
    change(folder, "*-1-L2A_data.tiff", 0, 0.0)
    away = tmp_path / "away"
    away.mkdir()
    for path in folder.glob("lr_dataset/*/L2A/*-3[-.]*"):
        path.rename(away / path.name)
    output, options = LocalStorage(tmp_path / "out"), ShardOptions(sample=TWO)
    with pytest.raises(
        TooFewAoisError, match=r"^0 usable .*; skipped: 3 no-data \(such as '.*', revisit 1 is all"
    ) as e:
        shard_folder(folder, output, options)
    assert e.value.to_json()["skipped"] == {"no-data": 3}
    for aoi in found(folder):
        for path in away.glob(f"{aoi.name}-3[-.]*"):
            path.rename(folder / "lr_dataset" / aoi.name / "L2A" / path.name)
    report = shard_folder(folder, output, options)
    assert len(report.passed) == 3
    assert report.index.skipped == ()
    again = shard_folder(folder, output, options)
    assert (again.shards, again.passed) == ({"kept": 3}, report.passed)
    folder, _, name = report.index.splits["train"][0].name.rpartition("/")
    assert read_sidecar(output.child(folder), name)


def test_the_reason_of_a_damaged_raster_is_the_same_in_each_run(folder: Path) -> None:
    for path in folder.glob("hr_dataset/*/*_pan.tiff"):
        path.write_bytes(path.read_bytes()[:300])
    reasons = set()
    for _ in range(2):
        with pytest.raises(UnusableError) as caught:
            make_sample(found(folder)[0], TWO)
        reasons.add(str(caught.value))
    (reason,) = reasons
    assert "vsimem" not in reason
