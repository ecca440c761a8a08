"""HDF5 patches become samples value for value, and what does not fit is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import h5py
import numpy as np
import pytest

from sharding.errors import UserError
from sharding.format.index import SPLITS
from sharding.format.sample import fetch_sample
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import shard_folder
from sharding.run.job import ShardOptions
from sharding.run.plan import PlanOptions
from sharding.sources.options import SourceOptions
from sharding.storage import open_storage
from tests.sharding.sources.sensors import write_hdf5

OPTIONS = ShardOptions(source=SourceOptions(source="pancollection"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("h5")
    for number, name in enumerate(("train_wv3.h5", "valid_wv3.h5", "test_wv3.h5")):
        write_hdf5(folder / name, 2, seed=number)
    return folder


def test_patches_are_samples_value_for_value(files: Path, tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "out")
    index = shard_folder(files, storage, OPTIONS, say=lambda line: None).index
    assert index.split_rule == "published"
    assert index.facts.ratio == (4, 1)
    assert index.facts.bands.lr == index.facts.bands.hr
    assert index.facts.bands.lr[:5] == ("coastal", "blue", "green", "yellow", "red")
    assert (index.facts.chips.size, index.facts.chips.count) == (64, 1)
    for split, name in zip(SPLITS, ("train_wv3", "valid_wv3", "test_wv3"), strict=True):
        assert {entry.aoi for _, entry in index.samples(split)} == {f"{name}-00000", f"{name}-00001"}
        with h5py.File(files / f"{name}.h5") as file:
            for shard, entry in index.samples(split):
                sample, number = fetch_sample(storage, shard, entry), int(entry.aoi[-5:])
                for mine, theirs in ((sample.lr[0], "ms"), (sample.hr, "gt"), (sample.pan, "pan")):
                    assert np.abs(mine * 3e-5 - file[theirs][number] / 2047).max() <= 1.6e-5
                assert sample.meta["radiometry"] == {"bits": 11, "scale": 1 / 2047}


def rewrite(path: Path, name: str, array: np.ndarray) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = array


def test_values_beyond_the_bits_are_skipped(tmp_path: Path) -> None:
    for number in range(4):
        write_hdf5(tmp_path / "in" / f"train_{number}_gf2.h5", 1, bands=4, bits=10, seed=number)
    with h5py.File(tmp_path / "in" / "train_2_gf2.h5", "r+") as file:
        file["gt"][0, 0, 0, 0] = 1024
    storage = open_storage(tmp_path / "out")
    index = shard_folder(tmp_path / "in", storage, OPTIONS, say=lambda line: None).index
    (skipped,) = index.skipped
    assert (skipped.aoi, skipped.reason) == ("train_2_gf2-00000", "implausible")
    assert "more than 10 bits" in skipped.detail


def test_a_file_that_does_not_fit_is_passed_over_with_its_reason(files: Path, tmp_path: Path) -> None:
    for path in files.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    (tmp_path / "broken_wv3.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    write_hdf5(tmp_path / "full_wv3.h5", 1)
    with h5py.File(tmp_path / "full_wv3.h5", "r+") as file:
        del file["gt"]
        file["gt"] = h5py.ExternalLink("train_wv3.h5", "gt")
    said: list[str] = []
    report = shard_folder(tmp_path, open_storage(tmp_path / "out"), OPTIONS, say=said.append)
    assert any("broken_wv3.h5 was passed over" in line for line in said)
    assert any("full_wv3.h5 was passed over: it holds no array 'gt' of its own" in line for line in said)
    assert len(list(itertools.chain.from_iterable(report.index.samples(split) for split in SPLITS))) == 6


def test_a_sensor_that_is_not_named_needs_its_bits(tmp_path: Path) -> None:
    for number in range(3):
        write_hdf5(tmp_path / "in" / f"train_{number}.h5", 1, bits=12, seed=number)
    with pytest.raises(UserError, match="give the bits of a value by --bits"):
        shard_folder(tmp_path / "in", open_storage(tmp_path / "out"), OPTIONS)
    named = ShardOptions(source=SourceOptions(source="pancollection", bits=12))
    index = shard_folder(tmp_path / "in", open_storage(tmp_path / "out"), named, say=lambda line: None).index
    assert index.statistics["pan"]["max"][0] <= 1.0


def test_a_folder_without_patches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no HDF5 file with ms, pan and gt"):
        shard_folder(tmp_path, open_storage(tmp_path / "out"), OPTIONS)


def test_revisits_are_simulated_in_training_not_stored() -> None:
    with pytest.raises(UserError, match=r"data\.simulated_revisits=4"):
        ShardOptions(SampleOptions(revisits=4), PlanOptions(), SourceOptions(source="pancollection"))
