"""The loader's memory: as many scenes as allowed, and constant over many epochs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import DataConfig
from pipeline.data import ChipDataset, TrainLoader, evaluation_batches
from pipeline.data.sample_reader import SampleReader
from pipeline.order import BatchPlan
from sharding.format.entries import SampleEntry, ShardEntry
from sharding.format.index import Index
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import Fill, LocalStorage, open_storage
from tests.pipeline.conftest import SMALL

MIB = 2**20


@pytest.fixture(scope="module")
def many_scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a dataset with more scenes than two threads need."""
    source = tmp_path_factory.mktemp("many")
    write_worldstrat(source, 20, seed=6, revisits=2, hr_side=80)
    storage = open_storage(source / "out")
    shard_folder(source, storage, ShardOptions(SMALL), workers=1, say=lambda _: None)
    return str(source / "out")


Reads = tuple[list[str], set[int]]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Record the AOIs that are read, one per read, and the addresses of the memory that they are read to."""
    aois: list[str] = []
    addresses: set[int] = set()
    read: Callable[..., int] = SampleReader.read

    def watched(self: SampleReader, shard: ShardEntry, entry: SampleEntry, buffer: memoryview) -> int:
        aois.append(entry.aoi)
        addresses.add(np.frombuffer(buffer, np.uint8).ctypes.data)
        return read(self, shard, entry, buffer)

    monkeypatch.setattr(SampleReader, "read", watched)
    return aois, addresses


def epochs(dataset: ChipDataset, first: int, last: int) -> None:
    loader = TrainLoader(dataset, BatchPlan.create(8, 0, 1), 0, seed=1)
    loader.step = first * loader.steps_per_epoch
    for _ in range(first, last):
        for batch in loader:
            assert torch.isfinite(batch.lr).all()
        for _ in evaluation_batches(dataset.sibling("val")):
            pass


@pytest.mark.parametrize("windows", [False, True])
def test_scenes_take_the_memory_that_they_were_given(many_scenes: str, reads: Reads, windows: bool) -> None:
    """Whole scenes are read to their final memory; for scenes cut into the same chips, each thread has one buffer."""
    aois, addresses = reads
    dataset = ChipDataset(many_scenes, "train", DataConfig(cache_mib=0, loader_threads=1, random_windows=windows))
    scenes = dataset.num_chips // 9
    assert dataset.scenes.capacity == 6 < scenes
    epochs(dataset, 0, 3)
    assert len(addresses) == 6 if windows else 1 <= len(addresses) <= 2
    assert len(aois) > 3 * scenes

    aois.clear()
    addresses.clear()
    ample = ChipDataset(many_scenes, "train", DataConfig(random_windows=windows))
    epochs(ample, 0, 3)
    assert len(aois) == len(set(aois)) == scenes + ample.sibling("val").num_chips // 9
    assert not windows or len(addresses) == len(aois)


def test_neighbours_come_by_one_request_where_requests_cost_something(
    many_scenes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches are the same, and the first ones' scenes come with their neighbours."""

    def read() -> tuple[list[torch.Tensor], int]:
        counted = 0
        read_into = LocalStorage.read_into

        def counting(self: LocalStorage, key: str, offset: int, buffer: memoryview) -> int:
            nonlocal counted
            counted += 1
            return read_into(self, key, offset, buffer)

        @contextlib.contextmanager
        def open_range(_: LocalStorage, key: str, offset: int, length: int) -> Iterator[Fill]:
            nonlocal counted
            counted += 1
            with Path(many_scenes, key).open("rb", buffering=0) as file:
                file.seek(offset)
                yield file.readinto

        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, "read_into", counting)
            patch.setattr(LocalStorage, "open_range", open_range)
            dataset = ChipDataset(many_scenes, "train", DataConfig(prefetch_batches=1, loader_threads=1))
            loader = TrainLoader(dataset, BatchPlan.create(2, 0, 1), 0, seed=1)
            return [tensor for batch in loader for tensor in batch.tensors], counted

    alone, requests = read()
    largest = max(entry.size for _, entry in Index.load(open_storage(many_scenes)).samples("train"))
    monkeypatch.setattr(LocalStorage, "request_bytes", 5 * largest)
    together, fewer = read()
    assert all(map(torch.equal, alone, together))
    assert requests == 16
    assert fewer <= 6


def test_epochs_leave_nothing_behind(many_scenes: str) -> None:
    """Five epochs read 200 MB of scenes and make 90 MB of batches; none of this memory may stay in use."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB

    dataset = ChipDataset(many_scenes, "train", DataConfig(cache_mib=0, loader_threads=2))
    epochs(dataset, 0, 2)
    before = resident()
    epochs(dataset, 2, 7)
    assert resident() - before < 10
