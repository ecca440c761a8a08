"""The same seven small AOIs in one, three and five training shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from sharding.format.index import Index
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.run.plan import PlanOptions
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage
from tests.conftest import SMALL
from tests.datasets import made_once


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """URIs of datasets by their number of training shards: five AOIs to train, one to validate, one to test."""
    folder = made_once(tmp_path_factory, "shards", make_shards)
    return {number: str(folder / name) for number, name in ((1, "one"), (3, "three"), (5, "five"))}


def make_shards(folder: Path) -> None:
    """Shard the same seven AOIs three times below ``folder``."""
    write_worldstrat(folder, 7, seed=4, revisits=2, hr_side=80)

    def make(number: int, name: str, shard_bytes: int) -> Index:
        storage = open_storage(folder / name)
        plan = PlanOptions(splits="seeded", fractions=(0.75, 0.1, 0.1), shard_bytes=shard_bytes)
        shard_folder(folder, storage, ShardOptions(SMALL, plan), workers=1, say=lambda _: None)
        index = Index.load(storage)
        assert len(index.splits["train"]) == number
        return index

    largest = max(entry.size for _, entry in make(1, "one", 10**9).samples("train"))
    make(3, "three", int(2.5 * largest))
    make(5, "five", 1)
