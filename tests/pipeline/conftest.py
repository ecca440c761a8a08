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


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Return URIs of datasets by their number of training shards: five AOIs to train, one to validate, one to test."""
    source = tmp_path_factory.mktemp("small")
    write_worldstrat(source, 7, seed=4, revisits=2, hr_side=80)

    def sharded(name: str, shard_bytes: int) -> tuple[int, str]:
        storage = open_storage(source / name)
        plan = PlanOptions(splits="seeded", fractions=(0.75, 0.1, 0.1), shard_bytes=shard_bytes)
        shard_folder(source, storage, ShardOptions(SMALL, plan), workers=1, say=lambda _: None)
        return len(Index.load(storage).splits["train"]), str(Path(source / name))

    one = sharded("one", 10**9)
    largest = max(entry.size for _, entry in Index.load(open_storage(one[1])).samples("train"))
    return dict([one, sharded("three", int(2.5 * largest)), sharded("five", 1)])
