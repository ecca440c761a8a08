"""Faults of networks, stores and disks under the loader, against a real S3 server: its batches stay the same."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.local.objectstore import ObjectStore
from pipeline.config import DataConfig
from pipeline.data import ChipDataset, TrainLoader
from pipeline.data.batches import Batch
from pipeline.data.disk_cache import SUFFIX, TEMPORARY_SUFFIX
from pipeline.data.sample_reader import SampleReader
from pipeline.data.scene_cache import SceneCache
from pipeline.data.scene_layout import WholeScene, WholeScenes
from pipeline.order import CHIPS_PER_SCENE, BatchPlan
from sharding.format.entries import SUFFIXES, SampleEntry, ShardEntry
from sharding.format.index import Index
from sharding.format.sample import fetch_sample
from sharding.run.verify import verify
from sharding.storage import CorruptedError, Storage, StorageUnavailableError, open_storage, retries
from tests.conftest import S3
from tests.faults import FaultProxy, Faults, Request, proxy_before
from tests.pipeline.data.test_data import copy_to

PLAN = BatchPlan.create(5, 5, 1)
"""Nine batches an epoch."""
Place = tuple[ShardEntry, SampleEntry]
SLOW = Faults(bytes_per_s=1e6)


def loader(uri: str, **options: object) -> TrainLoader:
    return TrainLoader(ChipDataset(uri, "train", DataConfig(**options)), PLAN, 0, seed=5)  # type: ignore[arg-type]


def dataset_of(batches: TrainLoader) -> ChipDataset:
    return batches._dataset


def shard_reads(proxy: FaultProxy) -> int:
    return len(proxy.seen("GET", ".tar"))


def asks_for(shard: ShardEntry, entry: SampleEntry) -> str:
    return f"{shard.name} bytes={entry.offset}-{entry.offset + entry.size - 1}"


def asked_for(request: Request) -> str:
    return f"{'/'.join(request.path.split('/')[-2:])} {request.headers.get('range')}"


def same(batches: Sequence[Batch], expected: Sequence[Batch]) -> bool:
    """Return whether all batches are present, bit for bit."""
    return [batch.chips for batch in batches] == [batch.chips for batch in expected] and all(
        torch.equal(own, other)
        for batch, wanted in zip(batches, expected, strict=True)
        for own, other in zip(batch.tensors, wanted.tensors, strict=True)
    )


@pytest.fixture(scope="module")
def local(shards: dict[int, str]) -> str:
    """Return five scenes to train with, in three shards on this machine's disk."""
    return shards[3]


@pytest.fixture(scope="module")
def expected(local: str) -> list[Batch]:
    """Return an epoch read without faults."""
    batches = list(loader(local).batches(0))
    assert len(batches) == 9
    return batches


@pytest.fixture(scope="module")
def places(local: str) -> list[Place]:
    return list(Index.load(open_storage(local)).samples("train"))


@pytest.fixture
def direct(s3: S3, local: str) -> Storage:
    """Copy a dataset to the store directly, not through the proxy."""
    uri = s3.prefix()
    copy_to(local, uri)
    storage = open_storage(uri)
    storage.exists("x")  # it keeps the endpoint of its first request
    return storage


@pytest.fixture
def proxy(s3: S3, direct: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Yield a proxy without faults yet, named in the environment."""
    with proxy_before(s3.environment, monkeypatch) as proxy:
        yield proxy


@pytest.mark.parametrize(
    ("kind", "faults"),
    [
        ("busy", Faults(busy=0.3)),
        ("cut", Faults(cut=0.3)),
        ("cut", Faults(cut=0.3, align=512)),
        ("stall", Faults(stall=0.2)),
    ],
    ids=["503", "cut", "cut-at-blocks", "stall"],
)
def test_a_bad_network_changes_no_batch(
    proxy: FaultProxy,
    direct: Storage,
    expected: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    faults: Faults,
) -> None:
    monkeypatch.setattr("sharding.storage.s3.client.READ_TIMEOUT_S", 0.5)
    proxy.faults = faults
    counted = 0
    for _ in range(8):
        batches = loader(direct.uri)
        assert same(list(batches.batches(0)), expected)
        counted += dataset_of(batches).storage.retries.total
    assert proxy.done(kind) >= 5
    assert counted >= proxy.done(kind)


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        (Faults(), 1),
        (Faults(busy=1.0, times=3), 4),
        (Faults(cut=1.0, times=4), 5),
        (Faults(stall=1.0, times=2), 3),
        (Faults(flip=1.0, times=1), 2),
    ],
    ids=["none", "503", "cut", "stall", "flip"],
)
def test_neighbours_in_a_shard_come_by_one_request_that_is_continued(
    proxy: FaultProxy,
    s3: S3,
    shards: dict[int, str],
    monkeypatch: pytest.MonkeyPatch,
    faults: Faults,
    requests: int,
) -> None:
    if faults.stall:
        monkeypatch.setattr("sharding.storage.s3.client.READ_TIMEOUT_S", 0.5)
    storage = open_storage(s3.prefix())
    copy_to(shards[1], storage.uri)
    samples = list(Index.load(storage).samples("train"))
    (shard,) = {shard.name: shard for shard, _ in samples}.values()
    entries = [entry for _, entry in samples]
    largest = max(entry.size for entry in entries)
    scenes = SceneCache(SampleReader(storage, None), WholeScenes(largest), 5 * largest, 1, quarantine=False)
    proxy.requests.clear()
    proxy.faults = faults
    scenes.prefetch(shard, entries)
    asked = [str(request.headers["range"]).split("=")[1].split("-") for request in proxy.seen("GET", ".tar")]
    end = entries[-1].offset + entries[-1].size - 1
    assert asked[0] == [str(entries[0].offset), str(end)]
    if faults.flip:  # read again alone, unlike the others
        ((again, last),) = asked[1:]
        assert (int(again), int(last) + 1) in {(entry.offset, entry.offset + entry.size) for entry in entries}
    else:
        assert [int(last) for _, last in asked] == [end] * len(asked)
    assert len(asked) == requests or (faults.stall and len(asked) > requests)  # a slow machine may stall too
    assert scenes.reader.refetched == faults.flip

    proxy.faults = Faults()
    proxy.requests.clear()
    for entry in entries:
        with scenes.use(shard, entry) as scene:
            stored = fetch_sample(open_storage(shards[1]), shard, entry)
            assert isinstance(scene, WholeScene)
            for name, image in zip(("lr", "hr", "pan"), scene.images, strict=True):
                assert np.array_equal(image, getattr(stored, name))
    assert proxy.requests == []


def test_a_slow_link_changes_no_batch_and_the_wait_is_measured(
    proxy: FaultProxy, direct: Storage, expected: list[Batch], places: list[Place]
) -> None:
    proxy.faults = SLOW
    batches = loader(direct.uri, loader_threads=1)
    taken, waited = [], 0.0
    for batch in batches.batches(0):
        taken.append(batch)
        waited += batches.wait_seconds
    assert same(taken, expected)
    # The link alone takes three times as long, and nothing else runs meanwhile.
    assert waited > sum(entry.size for _, entry in places) / SLOW.bytes_per_s / 3  # type: ignore[operator]


def regions(entry: SampleEntry) -> dict[str, int]:
    """Return a byte of every region of a sample, from its first byte."""
    found = {}
    for suffix in SUFFIXES:
        offset, length = entry.members[suffix]
        found[f"tar header of {suffix}"] = offset - 512 + 3
        found[f"payload of {suffix}"] = offset + length - 9
        if suffix.endswith("npy"):
            found[f"npy header of {suffix}"] = offset + 20
        if length % 512:
            found[f"padding after {suffix}"] = offset + length
    return found


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :]


def rounds(places: Sequence[Place]) -> Iterator[list[tuple[Place, int]]]:
    """Yield a byte of every region, each time one of each sample."""
    everywhere = [list(regions(entry).items()) for _, entry in places]
    given = set()
    for first in range(0, len(everywhere[0]), len(places)):
        chosen = [own[(first + number) % len(own)] for number, own in enumerate(everywhere)]
        given |= {region for region, _ in chosen}
        yield [(place, offset) for place, (_, offset) in zip(places, chosen, strict=True)]
    assert given >= regions(places[0][1]).keys()


def test_every_byte_before_a_shard_s_end_is_of_one_sample(local: str) -> None:
    index = Index.load(open_storage(local))
    for shard in (shard for shards in index.splits.values() for shard in shards):
        reached = 0
        for entry in shard.samples:
            assert entry.offset == reached
            reached += entry.size
            assert sum("padding" in region for region in regions(entry)) >= 3
        end = open_storage(local).read(shard.name)[reached:]
        assert end == bytes(len(end))


def test_damage_in_the_store_stops_and_names_the_sample(
    direct: Storage, expected: list[Batch], places: list[Place]
) -> None:
    shard, entry = places[1]
    whole = direct.read(shard.name)
    batches = loader(direct.uri)
    for number, (region, offset) in enumerate(regions(entry).items()):
        direct.write(shard.name, flipped(whole, entry.offset + offset))
        with pytest.raises(CorruptedError) as told:
            list(batches.batches(0))
        for name in (f"{direct.uri}/{shard.name}", repr(entry.key), repr(entry.aoi)):
            assert name in str(told.value), region
        assert dataset_of(batches).refetched > number, region
    direct.write(shard.name, whole)
    assert same(list(batches.batches(0)), expected)


def test_damage_in_the_store_is_quarantined(
    direct: Storage, expected: list[Batch], places: list[Place], tmp_path: Path
) -> None:
    shard, entry = places[1]
    whole = direct.read(shard.name)
    for region, offset in regions(entry).items():
        direct.write(shard.name, flipped(whole, entry.offset + offset))
        batches = loader(direct.uri, damaged="quarantine", cache_dir=str(tmp_path / region))
        taken = list(batches.batches(0))
        lost = {int(chip) for batch in taken for chip in torch.tensor(batch.chips)[batch.weight == 0]}
        assert lost == set(range(CHIPS_PER_SCENE, 2 * CHIPS_PER_SCENE)), region
        for batch, wanted in zip(taken, expected, strict=True):
            assert batch.chips == wanted.chips
            counts = batch.weight == 1
            for own, other in zip(batch.tensors, wanted.tensors, strict=True):
                assert own.isfinite().all()
                assert torch.equal(own[counts], other[counts]), region
        dataset = dataset_of(batches)
        assert (dataset.refetched, len(dataset.scenes.quarantined)) == (1, 1)
        assert len(list((tmp_path / region).glob(f"*{SUFFIX}"))) == len(places) - 1  # damaged bytes are not kept


def test_damage_at_a_shard_s_end_is_for_verify(direct: Storage, expected: list[Batch], places: list[Place]) -> None:
    shard, _ = places[1]
    direct.write(shard.name, flipped(direct.read(shard.name), shard.bytes - 1))
    assert same(list(loader(direct.uri).batches(0)), expected)
    assert {problem.shard for problem in verify(direct).problems} == {shard.name}


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_damage_on_the_way_is_read_again(
    proxy: FaultProxy, direct: Storage, expected: list[Batch], places: list[Place], first: bool
) -> None:
    """The damage is in the first or last sample of each shard, which is read alone or with its neighbour."""
    in_turn = reversed(places) if first else places
    of_each_shard = list({shard.name: (shard, entry) for shard, entry in in_turn}.values())
    for damages in rounds(of_each_shard):
        coming = {shard.name: entry.offset + offset for (shard, entry), offset in damages}

        def flip(request: Request, coming: dict[str, int] = coming) -> Faults:
            name, _, asked = asked_for(request).partition(" bytes=")
            if name not in coming:
                return Faults()
            start, end = map(int, asked.split("-"))
            return Faults(flip=1.0, at=coming.pop(name) - start) if start <= coming[name] <= end else Faults()

        proxy.requests.clear()
        proxy.faults = flip
        batches = loader(direct.uri)
        assert same(list(batches.batches(0)), expected)
        assert proxy.done("flip") == dataset_of(batches).refetched == len(of_each_shard)
        assert shard_reads(proxy) <= len(places) + len(of_each_shard)
        assert {asks_for(*place) for place in of_each_shard} <= set(map(asked_for, proxy.requests))


def test_damage_in_the_disk_cache_is_read_again_and_repaired(
    proxy: FaultProxy, direct: Storage, expected: list[Batch], places: list[Place], tmp_path: Path
) -> None:
    assert same(list(loader(direct.uri, cache_dir=str(tmp_path)).batches(0)), expected)
    files = {path: path.read_bytes() for path in tmp_path.glob(f"*{SUFFIX}")}
    assert len(files) == len(places)
    for damages in rounds(places):
        for (shard, entry), offset in damages:
            path = tmp_path / f"{shard.sha256[:32]}-{entry.offset}{SUFFIX}"
            path.write_bytes(flipped(files[path], offset))
        proxy.requests.clear()
        batches = loader(direct.uri, cache_dir=str(tmp_path))
        assert same(list(batches.batches(0)), expected)
        assert dataset_of(batches).refetched == shard_reads(proxy) == len(places)
        assert {path: path.read_bytes() for path in files} == files


def test_a_full_disk_costs_the_cache_alone(
    direct: Storage, expected: list[Batch], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    batches = loader(direct.uri, cache_dir=str(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # for any file: less than a scene
    try:
        taken = list(batches.batches(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(taken, expected)
    (told,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "cannot keep a file (File too large)" in told
    assert not [path for path in tmp_path.iterdir() if path.suffix in (SUFFIX, TEMPORARY_SUFFIX)]


@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({"loader_threads": 2}, 0),
        # So that not everything is prefetched before the first batch.
        ({"lanes": 1, "shuffle_window": 1, "loader_threads": 1, "prefetch_batches": 1, "cache_mib": 0}, 1),
    ],
    ids=["while others are on their way", "after a batch was taken"],
)
def test_a_store_killed_and_restarted_in_mid_epoch_changes_no_batch(
    s3: S3, local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int], after: int
) -> None:
    expected = list(loader(local, **options).batches(0))
    alive, killed = threading.Semaphore(), threading.Event()
    with ObjectStore(tmp_path, bucket="own") as store, FaultProxy(store.environment["AWS_ENDPOINT_URL"]) as proxy:
        for name, value in (store.environment | {"AWS_ENDPOINT_URL": proxy.url}).items():
            monkeypatch.setenv(name, value)
        copy_to(local, "s3://own/data")

        def kill(_: Request) -> Faults:
            """Kill the process at a further request, after two requests and so many batches."""
            if shard_reads(proxy) >= 2 and batches.step >= after and alive.acquire(blocking=False):
                store.stop()
                killed.set()
            return Faults(bytes_per_s=2e6)

        batches = loader("s3://own/data", **options)
        proxy.requests.clear()
        proxy.faults = kill
        with ThreadPoolExecutor(1) as pool:
            taken = pool.submit(lambda: list(batches))
            assert killed.wait(400)
            assert batches.step < len(expected)
            met = len(proxy.requests)
            while len(proxy.requests) < met + 3:
                time.sleep(0.01)
            store.start()  # here, because it ends with the thread that started it
            assert same(taken.result(), expected)
        assert dataset_of(batches).storage.retries.total >= 3
        assert dataset_of(batches).refetched == 0


def loading() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_a_store_that_stays_away_is_an_error_and_its_return_goes_on(
    proxy: FaultProxy, direct: Storage, local: str, places: list[Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 0.5)
    one_after_another = {
        "store_wait_seconds": 0.5,
        "lanes": 1,
        "shuffle_window": 1,
        "loader_threads": 2,
        "prefetch_batches": 1,
    }
    expected = list(loader(local, **one_after_another).batches(0))
    batches = loader(direct.uri, **one_after_another)
    first = {places[chip // CHIPS_PER_SCENE][0].name for chip in expected[0].chips}
    assert len(first) < len({shard.name for shard, _ in places})
    proxy.faults = lambda request: Faults() if asked_for(request).split()[0] in first else Faults(busy=1.0)
    taken: list[Batch] = []
    with pytest.raises(StorageUnavailableError, match=rf"cannot serve {direct.uri}/\S+ now \(SlowDown\)"):
        taken.extend(batches)
    assert not loading()
    assert len(taken) == batches.step
    assert 0 < batches.step < 9
    proxy.faults = Faults()
    assert same([*taken, *batches], expected)
