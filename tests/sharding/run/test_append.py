"""AOIs that a source gains are added to its dataset: what was there stays, byte for byte."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sharding.errors import UserError
from sharding.format.index import INDEX_NAME, SPLITS, Index
from sharding.format.sample import fetch_sample
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import Report, shard_folder
from sharding.run.job import ShardOptions
from sharding.run.plan import PlanOptions, extend_plan, make_plan
from sharding.run.prune import prune
from sharding.run.splits import natural_key
from sharding.run.verify import verify
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import LocalStorage, Storage, open_storage
from tests.sharding.conftest import TINY, World, digests

FIRST = replace(TINY, plan=PlanOptions(splits="seeded"))


def of(world: World, count: int) -> ShardOptions:
    return replace(FIRST, aois=tuple(world.names[:count]))


def splits_of(index: Index) -> dict[str, str]:
    return {sample.aoi: split for split in SPLITS for _, sample in index.samples(split)}


def test_new_aois_get_shards_of_their_own(tiny: World, output: Storage) -> None:
    old = shard_folder(tiny.folder, output, of(tiny, 4)).index
    before = digests(output)
    report = shard_folder(tiny.folder, output, FIRST)
    index, after = Index.load(output), digests(output)
    assert {key: after[key] for key in before if key != INDEX_NAME} == {
        key: digest for key, digest in before.items() if key != INDEX_NAME
    }
    assert index.appended == (tuple(sorted(tiny.names[4:], key=natural_key)),)
    assert splits_of(old).items() < splits_of(index).items()
    assert set(splits_of(index)) == set(tiny.names)
    assert [index.splits[split][: len(old.splits[split])] for split in SPLITS] == [old.splits[s] for s in SPLITS]
    assert report.shards["kept"] == 3
    assert "2 AOIs are added; the shards of the others stay as they are" in report.notes
    assert verify(output, deep=True, folder=tiny.folder).problems == ()
    # The same command again keeps all, and so does one by way of --overwrite.
    assert set(shard_folder(tiny.folder, output, FIRST).shards) == {"kept"}
    assert set(shard_folder(tiny.folder, output, FIRST, overwrite=True).shards) == {"kept"}
    assert digests(output) == after


def test_samples_and_statistics_are_those_of_one_run(tiny: World, tmp_path: Path) -> None:
    """All but the split and the order of the samples."""
    output = open_storage(tmp_path)
    shard_folder(tiny.folder, output, of(tiny, 3))
    for count in (5, 6):
        index = shard_folder(tiny.folder, output, of(tiny, count)).index
    whole = open_storage(tmp_path / "whole")
    other = shard_folder(tiny.folder, whole, FIRST).index
    assert index.appended == (tuple(tiny.names[3:5]), tuple(tiny.names[5:]))
    places = {entry.aoi: (shard, entry) for split in SPLITS for shard, entry in other.samples(split)}
    values = []
    for split in SPLITS:
        for shard, entry in index.samples(split):
            sample = fetch_sample(output, shard, entry)
            assert np.array_equal(sample.hr, fetch_sample(whole, *places[entry.aoi]).hr)
            values += [sample.hr[0].ravel()] if split == "train" else []
    assert index.statistics["hr"]["mean"][0] == pytest.approx(np.concatenate(values).mean() * 3e-5, rel=1e-5)


def test_an_addition_does_not_read_the_old_shards(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = open_storage(tmp_path)
    shard_folder(tiny.folder, output, of(tiny, 4))
    read: list[str] = []

    def stream(self: LocalStorage, key: str) -> object:
        read.append(key)
        return iter([])

    monkeypatch.setattr(LocalStorage, "stream", stream)
    # The new shards are compared with nothing, for there is none yet.
    assert shard_folder(tiny.folder, output, of(tiny, 5)).shards == {"kept": 3, "made": 1}
    assert len(read) <= 1


def test_an_old_shard_of_another_size_is_repaired_on_the_way(tiny: World, tmp_path: Path) -> None:
    output = open_storage(tmp_path)
    index = shard_folder(tiny.folder, output, of(tiny, 4)).index
    path = tmp_path / index.splits["val"][0].name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert shard_folder(tiny.folder, output, FIRST).shards["repaired"] == 1
    assert path.read_bytes() == whole


def test_an_interrupted_addition_is_resumed(tiny: World, tmp_path: Path) -> None:
    output = open_storage(tmp_path)
    shard_folder(tiny.folder, output, of(tiny, 4))
    old = (tmp_path / INDEX_NAME).read_bytes()
    index = shard_folder(tiny.folder, output, FIRST).index
    after = digests(output)
    (tmp_path / INDEX_NAME).write_bytes(old)  # as if the run had been killed before its last write
    (tmp_path / index.splits["train"][-1].name).unlink()
    assert shard_folder(tiny.folder, output, FIRST).shards["made"] == 1
    assert digests(output) == after


def test_pruning_keeps_the_shards_of_all_additions(tiny: World, tmp_path: Path) -> None:
    output = open_storage(tmp_path)
    shard_folder(tiny.folder, output, of(tiny, 4))
    index = shard_folder(tiny.folder, output, FIRST).index
    prune(output)
    assert verify(output, deep=True).problems == ()
    assert shard_folder(tiny.folder, output, FIRST).index.digest == index.digest
    assert set(shard_folder(tiny.folder, output, FIRST).shards) == {"kept"}


def test_a_damaged_index_of_additions_is_repaired(tiny: World, tmp_path: Path) -> None:
    output = open_storage(tmp_path)
    shard_folder(tiny.folder, output, of(tiny, 4))
    shard_folder(tiny.folder, output, FIRST)
    whole = (tmp_path / INDEX_NAME).read_bytes()
    (tmp_path / INDEX_NAME).write_bytes(whole[: len(whole) // 2])
    assert set(shard_folder(tiny.folder, output, FIRST).shards) == {"kept"}
    assert (tmp_path / INDEX_NAME).read_bytes() == whole


def test_another_seed_or_a_missing_aoi_is_another_dataset(tiny: World, tmp_path: Path) -> None:
    output = open_storage(tmp_path)
    shard_folder(tiny.folder, output, of(tiny, 4))
    before = digests(output)
    for options in (replace(FIRST, plan=PlanOptions(splits="seeded", seed=5)), replace(FIRST, aois=tiny.names[1:])):
        with pytest.raises(UserError, match="holds another dataset"):
            shard_folder(tiny.folder, output, options)
    assert digests(output) == before
    index = shard_folder(tiny.folder, output, FIRST, overwrite=True).index
    assert index.appended == ()


def test_an_unusable_new_aoi_is_added_when_it_is_complete(spoilt: World, tmp_path: Path) -> None:
    output = open_storage(tmp_path)
    names = spoilt.names
    late = spoilt.folder / "hr_dataset" / names[5]
    shutil.move(late, tmp_path / "late")
    (spoilt.folder / "hr_dataset" / names[5]).mkdir()
    before = shard_folder(spoilt.folder, output, of(spoilt, 5)).index
    assert shard_folder(spoilt.folder, output, FIRST).index.digest == before.digest
    late.rmdir()
    shutil.move(tmp_path / "late", late)
    assert shard_folder(spoilt.folder, output, FIRST).index.appended == ((names[5],),)


def test_two_aois_added_to_fifty_cost_what_they_are(tmp_path: Path) -> None:
    options = ShardOptions(SampleOptions(revisits=1, lr_size=60, hr_size=60), PlanOptions(shard_bytes=400_000))
    names = write_worldstrat(tmp_path / "in", 52, seed=1, revisits=1, hr_side=66)
    output = open_storage(tmp_path / "out")
    first = shard_folder(tmp_path / "in", output, replace(options, aois=tuple(names[:50])))
    before = {item.key: item.size for item in output.list()}
    changed = {key: (tmp_path / "out" / key).stat().st_mtime_ns for key in before}
    report: Report = shard_folder(tmp_path / "in", output, options)
    written = sum(
        item.size
        for item in output.list()
        if item.key not in before or (tmp_path / "out" / item.key).stat().st_mtime_ns != changed[item.key]
    )
    share = first.bytes_out / 50
    assert report.bytes_out < 2 * share * 1.3  # the padding of their shards included
    assert len(report.index.samples("train")) + len(report.index.samples("val")) >= 46
    assert written < 0.10 * sum(before.values())
    assert set(report.shards) == {"kept", "made"}


def plans(first: int, additions: Sequence[int], groups: dict[str, str] | None = None) -> dict[str, list[str]]:
    names = [f"a{number}" for number in range(first + sum(additions))]
    whole = groups or {name: name for name in names}
    options = PlanOptions(splits="seeded")
    plan = make_plan(names[:first], names[:first], None, 10**6, options)
    done = first
    for number, count in enumerate(additions):
        before = {split: list(found) for split, found in plan.split.splits.items()}
        plan = extend_plan(plan, names[done : done + count], number, None, 10**6, options, whole)
        done += count
        assert all(plan.split.splits[split][: len(found)] == found for split, found in before.items())
    assert len({shard.name for shard in plan.shards}) == len(plan.shards)
    assert Counter(aoi for shard in plan.shards for aoi in shard.aois) == Counter(
        aoi for found in plan.split.splits.values() for aoi in found
    )
    return plan.split.splits


def test_additions_keep_the_shares_of_the_splits() -> None:
    assert {split: len(found) for split, found in plans(100, [50, 50]).items()} == {
        "train": 160,
        "val": 20,
        "test": 20,
    }
    single = plans(10, [1] * 90)
    assert {split: len(found) for split, found in single.items()} == {"train": 80, "val": 10, "test": 10}


def test_an_aoi_that_shows_known_land_joins_its_split() -> None:
    splits = plans(10, [])
    names = [f"a{number}" for number in range(14)]
    groups = {name: name for name in names} | {"a10": splits["test"][0], "a11": splits["val"][0]}
    found = plans(10, [4], groups)
    assert "a10" in found["test"]
    assert "a11" in found["val"]


def test_an_aoi_that_shows_land_of_two_splits_is_left_out() -> None:
    names = [f"a{number}" for number in range(11)]
    options = PlanOptions(splits="seeded")
    plan = make_plan(names[:10], names[:10], None, 10**6, options)
    joined = {plan.split.splits["val"][0], plan.split.splits["train"][0], "a10"}
    groups = {name: "one" if name in joined else name for name in names}
    extended = extend_plan(plan, ["a10"], 0, None, 10**6, options, groups)
    assert extended.split.torn == (("a10", ("train", "val")),)
    assert extended.shards == plan.shards
