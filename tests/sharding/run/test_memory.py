"""Memory does not grow with the number of AOIs: neither where shards are made, nor where they are planned."""

from __future__ import annotations

import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.sharding_memory import watch
from benchmarks.trees import plant
from sharding.format.index import INDEX_NAME, SPLITS
from sharding.format.layout import worldstrat_facts
from sharding.format.sample import fetch_sample
from sharding.format.statistics import VALUES
from sharding.prepare.options import SampleOptions
from sharding.run.build import ShardTask, build_shard
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.run.plan import PlanOptions
from sharding.sources.options import SourceOptions
from sharding.storage import open_storage
from tests.sharding.conftest import TINY, Dataset, World, aois_of


def test_counts_are_added_up_on_the_way(tmp_path: Path) -> None:
    plant(tmp_path / "in", 60, revisits=1, hr_side=80)
    options = ShardOptions(SampleOptions(revisits=1, lr_size=16, hr_size=50), PlanOptions(shard_bytes=1))
    tracemalloc.start()
    try:
        index = shard_folder(tmp_path / "in", open_storage(tmp_path / "out"), options).index
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(index.splits["train"]) == 48
    counts = 8 * VALUES * 7  # of a shard: lr and hr have three bands, pan one
    assert peak < 10 * counts


def test_the_plan_names_a_folder_once_and_results_name_none(tiny: World, tmp_path: Path) -> None:
    aois = aois_of(tiny.folder)
    folder = str(tiny.folder).encode()
    assert pickle.dumps(aois[0]).count(folder) == 2  # of the SPOT rasters, of the revisits
    facts, limits = worldstrat_facts(TINY.sample), SourceOptions()
    task = ShardTask("train", "train-00000.tar", tuple(aois), TINY.sample, False, open_storage(tmp_path), facts, limits)
    result = build_shard(task)
    assert result.entry
    assert folder not in pickle.dumps(replace(result, histograms={}))


def test_the_index_holds_no_digest_of_a_source_file(dataset: Dataset) -> None:
    text = dataset.storage.read(INDEX_NAME).decode()
    digests = [
        digest
        for split in SPLITS
        for pair in dataset.index.samples(split)
        for digest in fetch_sample(dataset.storage, *pair).meta["sources"].values()  # type: ignore[attr-defined]
    ]
    assert len(digests) > 200
    assert not any(digest in text for digest in digests)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """AOIs of full size, 20 and ten times as many."""
    folder = tmp_path_factory.mktemp("trees")
    for aois in (20, 200):
        plant(folder / f"{aois}", aois)
    return [folder / "20", folder / "200"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ten_times_the_aois_take_the_same_memory(workers: int, trees: list[Path], tmp_path: Path) -> None:
    # Two AOIs a shard: what is kept of each shard shows.
    few, many = (watch(tree, tmp_path / tree.name, workers, "--shard-size", "7") for tree in trees)
    assert len(many.workers) == (workers if workers > 1 else 0)
    assert many.worker < 1 << 30
    assert many.worker < 1.1 * few.worker
    assert many.command < 1.1 * few.command
