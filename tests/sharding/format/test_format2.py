"""A dataset of format 2 is read, verified and sharded again with the digest that it has always had."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sharding.format.index import Index
from sharding.format.layout import ArrayLayout, ChipGrid, worldstrat_facts
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.run.verify import verify
from sharding.storage import open_storage
from tests.format2 import to_format_2
from tests.sharding.conftest import Dataset, World, digests

FIXED = ShardOptions(SampleOptions(revisits=3, lr_size=40, hr_size=60))
NATIVE = ShardOptions(SampleOptions(revisits=3, lr_size=None, hr_size=None))


@pytest.mark.parametrize("options", [FIXED, NATIVE], ids=["fixed", "native"])
def test_sharding_again_keeps_shards_and_index(tiny: World, tmp_path: Path, options: ShardOptions) -> None:
    output = open_storage(tmp_path)
    new = shard_folder(tiny.folder, output, options).index
    data = to_format_2(tmp_path)
    before = digests(output)
    old = Index.load(output)
    assert (old.format_version, old.digest) == (2, hashlib.sha256(data).hexdigest())
    # Format 2 does not tell the sizes of native samples, and so not how many chips fit.
    facts = replace(new.facts, chips=old.facts.chips) if options == NATIVE else new.facts
    assert (old.facts, old.plan, old.statistics) == (facts, new.plan, new.statistics)
    report = shard_folder(tiny.folder, output, options)
    assert set(report.shards) == {"kept"}
    assert report.index.digest == old.digest
    assert digests(output) == before
    assert verify(output, deep=True, folder=tiny.folder).problems == ()


@pytest.mark.parametrize("options", [FIXED, NATIVE], ids=["fixed", "native"])
def test_repair_keeps_the_index_of_format_2(tiny: World, tmp_path: Path, options: ShardOptions) -> None:
    output = open_storage(tmp_path)
    shard_folder(tiny.folder, output, options)
    data = to_format_2(tmp_path)
    shard = Index.load(output).splits["val"][0]
    (tmp_path / shard.name).unlink()
    report = shard_folder(tiny.folder, output, options)
    assert report.shards == {"kept": 2, "made": 1}
    assert (tmp_path / "index.json").read_bytes() == data
    assert verify(output, deep=True).problems == ()


def test_an_interrupted_run_of_format_2_resumes_as_format_3(tiny: World, tmp_path: Path) -> None:
    output = open_storage(tmp_path)
    new = shard_folder(tiny.folder, output, FIXED).index
    to_format_2(tmp_path)
    (tmp_path / "index.json").unlink()
    report = shard_folder(tiny.folder, output, FIXED)
    assert set(report.shards) == {"kept"}
    assert (report.index.format_version, report.index.plan, report.index.facts) == (3, new.plan, new.facts)
    assert [sample for _, sample in report.index.samples("train")] == [sample for _, sample in new.samples("train")]
    assert not list(tmp_path.glob("plan-*/*.tar"))


def test_an_index_of_format_2_gives_its_own_bytes_back(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copy(dataset.folder / "index.json", tmp_path)
    data = to_format_2(tmp_path)
    assert Index.from_json(data).to_json().encode() == data
    # Another program may have laid the same out otherwise: the digest is that of the bytes.
    spread = json.dumps(json.loads(data), indent=1).encode()
    assert Index.from_json(spread).data == spread
    assert Index.from_json(spread).digest == hashlib.sha256(spread).hexdigest()
    assert replace(Index.from_json(spread), split_seed=5).data != spread


def test_format_3_tells_what_readers_need(dataset: Dataset) -> None:
    table = json.loads(dataset.index.data)
    assert table["format_version"] == 3
    assert table["facts"] == {
        "source": "worldstrat",
        "bands": {"lr": ["red", "green", "blue"], "hr": ["red", "green", "blue"]},
        "ratio": [500, 160],
        "chips": {"size": 50, "stride": 50, "columns": 3, "rows": 3},
        "radiometry": {"scale": 3e-5, "offset": 0.0},
        "masks": ["clm"],
    }
    assert table["layouts"] == [
        {
            "lr": {"shape": [8, 3, 160, 160], "dtype": "<u2"},
            "clm": {"shape": [8, 1, 160, 160], "dtype": "|u1"},
            "hr": {"shape": [3, 500, 500], "dtype": "<u2"},
            "pan": {"shape": [1, 500, 500], "dtype": "<u2"},
        }
    ]
    assert {sample["layout"] for sample in table["splits"]["train"][0]["samples"]} == {0}


def test_native_samples_have_layouts_of_their_own(tiny: World, tmp_path: Path) -> None:
    index = shard_folder(tiny.folder, open_storage(tmp_path), NATIVE).index
    assert index.facts.ratio is None
    layouts = {sample.layout["hr"] for split in index.splits for _, sample in index.samples(split)}
    assert layouts == {ArrayLayout((3, 80, 80), "<u2")}
    assert Index.from_json(index.data) == index


def test_names_of_bands() -> None:
    assert worldstrat_facts(SampleOptions(level="l1c", bands="all")).bands.lr[10] == "cirrus"
    assert len(worldstrat_facts(SampleOptions(bands="all")).bands.lr) == 12


def test_a_chip_grid() -> None:
    grid = ChipGrid(size=50, stride=40, columns=3, rows=2)
    assert (grid.count, grid.extent) == (6, (90, 130))


def test_shards_may_lie_in_the_folder_of_their_plan(dataset: Dataset) -> None:
    table = json.loads(dataset.index.data)
    table["splits"]["val"][0]["name"] = "plan-0123456789abcdef/val-00000.tar"
    assert Index.from_json(json.dumps(table)).splits["val"][0].name == "plan-0123456789abcdef/val-00000.tar"
