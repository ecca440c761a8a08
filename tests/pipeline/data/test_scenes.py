"""Scenes in memory: one read each, a limit, and the handling of errors and damage."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.chips import Window
from pipeline.data.sample_reader import SampleReader
from pipeline.data.scene_cache import SceneCache
from pipeline.data.scene_layout import Scene, WholeScene, WholeScenes, clearest
from sharding.format.entries import SampleEntry, ShardEntry
from sharding.format.index import Index
from sharding.format.sample import fetch_sample
from sharding.storage import (
    BucketNotFoundError,
    CorruptedError,
    Fill,
    NotFoundError,
    Storage,
    StorageUnavailableError,
    open_storage,
)
from tests.pipeline.data.test_data import copy_to

Place = tuple[ShardEntry, SampleEntry]


class Watched(SampleReader):
    """Reader whose real reads are recorded, wait while the gate is closed, and fail with the errors in store."""

    request_bytes = 1 << 20  # type: ignore[assignment]

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage, None)
        self.reads: list[str] = []
        self.errors: list[BaseException] = []
        self.gate = threading.Event()
        self.gate.set()

    def read(self, shard: ShardEntry, entry: SampleEntry, buffer: memoryview) -> int:
        self.reads.append(entry.key)
        self._wait_or_fail()
        return super().read(shard, entry, buffer)

    def fills(self, shard: ShardEntry, entries: Sequence[SampleEntry]) -> Iterator[Fill]:
        if len(entries) < 2:
            yield from super().fills(shard, entries)
            return
        self.reads.append("+".join(entry.key for entry in entries))
        for fill in super().fills(shard, entries):
            yield partial(self._fill, fill)

    def _fill(self, fill: Fill, buffer: memoryview) -> int:
        self._wait_or_fail()
        return fill(buffer)

    def _wait_or_fail(self) -> None:
        self.gate.wait()
        if self.errors:
            raise self.errors.pop()


@pytest.fixture
def reader(shards: dict[int, str]) -> Watched:
    return Watched(open_storage(shards[3]))


@pytest.fixture(scope="module")
def places(shards: dict[int, str]) -> list[Place]:
    """Return five scenes."""
    return list(Index.load(open_storage(shards[3])).samples("train"))


def scenes_of(
    reader: SampleReader, places: list[Place], held: int = 2, *, threads: int = 1, quarantine: bool = False
) -> SceneCache:
    largest = max(entry.size for _, entry in places)
    return SceneCache(reader, WholeScenes(largest), held * largest, threads, quarantine=quarantine)


def prefetch(scenes: SceneCache, *places: Place) -> None:
    scenes.prefetch(places[0][0], [entry for _, entry in places])


def name_of(scene: Scene | None) -> str:
    assert scene is not None
    return str(json.loads(scene.text)["aoi"])


def assert_as_stored(scenes: SceneCache, places: list[Place], uri: str) -> None:
    for shard, entry in places:
        stored = fetch_sample(open_storage(uri), shard, entry)
        with scenes.use(shard, entry) as scene:
            assert isinstance(scene, WholeScene)
            for name, image in zip(("lr", "hr", "pan"), scene.images, strict=True):
                assert np.array_equal(image, getattr(stored, name))
            assert clearest(scene, Window(0, 0, 4, 0, 0, 8)) == stored.meta["clearest"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_scene_is_what_is_stored(reader: Watched, places: list[Place], shards: dict[int, str]) -> None:
    scenes = scenes_of(reader, places)
    assert_as_stored(scenes, places, shards[3])


@pytest.mark.parametrize("held", [2, 3])
def test_memory_is_bounded_and_used_again(reader: Watched, places: list[Place], held: int) -> None:
    scenes = scenes_of(reader, places, held)
    assert scenes.capacity == held
    addresses = set()
    for place in places * 3:
        with scenes.use(*place) as scene:
            assert isinstance(scene, WholeScene)
            assert name_of(scene) == place[1].aoi
            addresses.add(scene.images[0].ctypes.data)
    assert len(addresses) == held
    assert len(reader.reads) == 15  # five in a row evict any next scene


def test_what_the_threads_work_on_has_room_in_any_case(reader: Watched, places: list[Place]) -> None:
    assert scenes_of(reader, places, 0, threads=4).capacity == 8


def test_the_least_recently_used_scene_goes(reader: Watched, places: list[Place]) -> None:
    scenes = scenes_of(reader, places, 3)
    a, b, c, d, _ = places

    def use(*wanted: Place) -> list[str]:
        reader.reads.clear()
        for place in wanted:
            with scenes.use(*place):
                pass
        return list(reader.reads)

    assert use(a, b, c, a, d) == [place[1].key for place in (a, b, c, d)]
    assert use(a, c, d) == []
    assert use(b) == [b[1].key]
    assert use(c, d) == []
    assert use(a) == [a[1].key]


def test_a_scene_in_use_stays(reader: Watched, places: list[Place]) -> None:
    scenes = scenes_of(reader, places, 2)
    with scenes.use(*places[0]) as scene:
        for place in places[1:] * 2:
            with scenes.use(*place) as other:
                assert name_of(other) == place[1].aoi
            assert name_of(scene) == places[0][1].aoi
        with scenes.use(*places[0]):
            assert reader.reads.count(places[0][1].key) == 1


def test_many_threads_share_one_read(reader: Watched, places: list[Place]) -> None:
    scenes = scenes_of(reader, places, 2, threads=8)
    reader.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(used, scenes, places[0]) for _ in range(8)]
        everybody_waits(scenes, places[0], 8)
        reader.gate.set()
        assert {call.result() for call in calls} == {places[0][1].aoi}
    assert reader.reads == [places[0][1].key]


def used(scenes: SceneCache, place: Place) -> str:
    with scenes.use(*place) as scene:
        return name_of(scene)


def everybody_waits(scenes: SceneCache, place: Place, threads: int) -> None:
    wait_for(lambda: place[1].key in scenes._cached and scenes._cached[place[1].key].users == threads)


def test_an_error_reaches_all_who_wait_and_the_next_one_reads_again(reader: Watched, places: list[Place]) -> None:
    scenes = scenes_of(reader, places, 2)
    reader.gate.clear()
    reader.errors = [StorageUnavailableError("away")]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(used, scenes, places[0]) for _ in range(4)]
        everybody_waits(scenes, places[0], 4)
        reader.gate.set()
        for call in calls:
            with pytest.raises(StorageUnavailableError, match="away"):
                call.result()
    assert len(reader.reads) == 1
    assert used(scenes, places[0]) == places[0][1].aoi


def test_reads_that_fail_keep_no_memory(reader: Watched, places: list[Place]) -> None:
    scenes = scenes_of(reader, places, 2)
    reader.errors = [StorageUnavailableError("away") for _ in range(10)]
    for place in places * 2:
        with pytest.raises(StorageUnavailableError):
            used(scenes, place)
    assert [used(scenes, place) for place in places] == [entry.aoi for _, entry in places]


def test_memory_that_cannot_be_had_is_an_error_for_everybody(reader: Watched, places: list[Place]) -> None:
    scenes = SceneCache(reader, WholeScenes(1 << 50), 0, 1, quarantine=False)
    for _ in range(3):
        with pytest.raises(MemoryError):
            used(scenes, places[0])


def test_what_was_not_read_ahead_is_read_by_who_needs_it(reader: Watched, places: list[Place]) -> None:
    scenes = scenes_of(reader, places, 2)
    reader.errors = [CorruptedError("damaged")]
    prefetch(scenes, places[0])
    assert used(scenes, places[0]) == places[0][1].aoi
    prefetch(scenes, places[1])
    assert used(scenes, places[1]) == places[1][1].aoi
    assert len(reader.reads) == 3


def test_a_store_that_is_away_is_not_read_ahead_from(reader: Watched, places: list[Place]) -> None:
    """A prefetch would wait for each, and a thread that needs a scene now would wait behind all of them."""
    scenes = scenes_of(reader, places, 3)
    reader.errors = [StorageUnavailableError("away") for _ in range(2)]
    for place in places:
        prefetch(scenes, place)
    assert reader.reads == [places[0][1].key]
    with pytest.raises(StorageUnavailableError):
        used(scenes, places[1])
    assert used(scenes, places[1]) == places[1][1].aoi
    prefetch(scenes, places[2])
    assert reader.reads[-1] == places[2][1].key


@pytest.fixture(scope="module")
def neighbours(shards: dict[int, str]) -> list[Place]:
    """Return five scenes of one shard."""
    return list(Index.load(open_storage(shards[1])).samples("train"))


def keys(*places: Place) -> str:
    return "+".join(entry.key for _, entry in places)


def test_neighbours_are_read_together(shards: dict[int, str], neighbours: list[Place]) -> None:
    """Cached scenes separate the others into two requests."""
    reader = Watched(open_storage(shards[1]))
    scenes = scenes_of(reader, neighbours, 5)
    a, b, c, d, e = neighbours
    assert used(scenes, c) == c[1].aoi
    prefetch(scenes, a, b, c, d, e)
    assert reader.reads == [keys(c), keys(a, b), keys(d, e)]
    assert_as_stored(scenes, neighbours, shards[1])
    prefetch(scenes, a, b, c, d, e)
    assert len(reader.reads) == 3
    assert scenes._free == []
    assert all(cached.users == 0 for cached in scenes._cached.values())


def test_neighbours_need_no_more_memory_at_once_than_there_is(shards: dict[int, str], neighbours: list[Place]) -> None:
    reader = Watched(open_storage(shards[1]))
    scenes = scenes_of(reader, neighbours, 2)
    prefetch(scenes, *neighbours)
    assert reader.reads == [keys(*neighbours)]
    assert [used(scenes, place) for place in neighbours] == [entry.aoi for _, entry in neighbours]


def test_who_waits_for_a_neighbour_is_told_that_the_store_is_away(
    shards: dict[int, str], neighbours: list[Place]
) -> None:
    reader = Watched(open_storage(shards[1]))
    scenes = scenes_of(reader, neighbours, 5, threads=3)
    reader.gate.clear()
    reader.errors = [StorageUnavailableError("away")]
    with ThreadPoolExecutor(2) as pool:
        ahead = pool.submit(prefetch, scenes, *neighbours)
        wait_for(lambda: len(scenes._cached) == 5)
        waiting = pool.submit(used, scenes, neighbours[3])
        everybody_waits(scenes, neighbours[3], 2)
        reader.gate.set()
        with pytest.raises(StorageUnavailableError):
            waiting.result()
        ahead.result()
    prefetch(scenes, *neighbours)
    assert reader.reads == [keys(*neighbours)]  # not read again before a thread needs a scene and gets it
    assert used(scenes, neighbours[4]) == neighbours[4][1].aoi
    prefetch(scenes, *neighbours)
    assert reader.reads[1:] == [keys(neighbours[4]), keys(*neighbours[:4])]


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_damage_among_neighbours_is_read_again_and_costs_none_of_the_others(
    shards: dict[int, str], neighbours: list[Place], tmp_path: Path, harm: str
) -> None:
    copy_to(shards[1], str(tmp_path))
    shard, entry = neighbours[2]
    path = tmp_path / shard.name
    data = bytearray(path.read_bytes())
    data[entry.offset + 100] ^= 1
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(data if harm == "flipped" else data[: entry.offset + 100])
    reader = Watched(open_storage(tmp_path))
    scenes = scenes_of(reader, neighbours, 5, quarantine=True)
    prefetch(scenes, *neighbours)
    lost = {"flipped": neighbours[2:3], "cut": neighbours[2:], "gone": neighbours}[harm]
    assert reader.reads == [keys(*neighbours)]
    assert reader.refetched == (0 if harm == "gone" else 2 * len(lost))  # and each of them alone
    assert scenes.quarantined.keys() == {entry.key for _, entry in lost}
    for place in neighbours:
        assert nothing(scenes, place) == (place in lost)


@pytest.fixture
def damaged(shards: dict[int, str], places: list[Place], tmp_path: Path) -> Watched:
    """Damage the first scene."""
    copy_to(shards[3], str(tmp_path))
    shard, entry = places[0]
    data = bytearray((tmp_path / shard.name).read_bytes())
    data[entry.offset + entry.size // 2] ^= 4
    (tmp_path / shard.name).write_bytes(data)
    return Watched(open_storage(tmp_path))


def test_quarantine_is_told_once_and_remembered(
    damaged: Watched, places: list[Place], caplog: pytest.LogCaptureFixture
) -> None:
    scenes = scenes_of(damaged, places, 2, threads=6, quarantine=True)
    caplog.set_level(logging.WARNING)
    damaged.gate.clear()
    with ThreadPoolExecutor(12) as pool:
        ahead = [pool.submit(prefetch, scenes, places[0]) for _ in range(6)]
        everybody_waits(scenes, places[0], 1)  # a thread that prefetches waits for no other
        calls = [pool.submit(nothing, scenes, places[0]) for _ in range(6)]
        everybody_waits(scenes, places[0], 7)
        damaged.gate.set()
        assert all(call.result() for call in calls)
        assert [call.result() for call in ahead] == [None] * 6
    assert nothing(scenes, places[0])
    assert damaged.reads == [places[0][1].key]
    assert damaged.refetched == 1
    (record,) = caplog.records
    assert places[0][1].aoi in record.getMessage()
    assert scenes.quarantined.keys() == {places[0][1].key}
    assert used(scenes, places[1]) == places[1][1].aoi


def nothing(scenes: SceneCache, place: Place) -> bool:
    with scenes.use(*place) as scene:
        return scene is None


def test_damage_stops_whoever_asks_and_names_the_scene(damaged: Watched, places: list[Place]) -> None:
    scenes = scenes_of(damaged, places, 2)
    shard, entry = places[0]
    for _ in range(2):
        with pytest.raises(CorruptedError) as told:
            used(scenes, places[0])
        for name in (f"/{shard.name}", repr(entry.key), repr(entry.aoi)):
            assert name in str(told.value)
    assert scenes.quarantined == {}


def test_a_store_that_does_not_answer_is_no_damage(reader: Watched, places: list[Place]) -> None:
    scenes = scenes_of(reader, places, 2, quarantine=True)
    reader.errors = [StorageUnavailableError("away")]
    with pytest.raises(StorageUnavailableError):
        used(scenes, places[0])
    assert used(scenes, places[0]) == places[0][1].aoi


@pytest.mark.parametrize(
    ("error", "kind"), [(NotFoundError, CorruptedError), (BucketNotFoundError, BucketNotFoundError)]
)
def test_a_shard_that_is_gone_is_damage_and_a_bucket_is_not(
    places: list[Place], shards: dict[int, str], monkeypatch: pytest.MonkeyPatch, error: type[Exception], kind: type
) -> None:
    storage = open_storage(shards[3])

    def gone(*_: object) -> int:
        raise error("is gone")

    monkeypatch.setattr(type(storage), "read_into", gone)
    with pytest.raises(NotFoundError if kind is BucketNotFoundError else CorruptedError, match="is gone") as told:
        SampleReader(storage, None).read(*places[0], memoryview(bytearray(places[0][1].size)))
    assert type(told.value) is kind


def test_more_threads_than_there_is_memory_for_hang_not_and_see_what_they_asked_for(
    shards: dict[int, str], neighbours: list[Place]
) -> None:
    places, reader = neighbours, Watched(open_storage(shards[1]))
    scenes = scenes_of(reader, places, 0, threads=1)
    assert scenes.capacity == 2

    def work(seed: int) -> int:
        draw = np.random.default_rng(seed)
        seen = 0
        for number in draw.integers(len(places), size=60):
            if draw.random() < 0.3:
                first = draw.integers(len(places))
                prefetch(scenes, *places[first : first + draw.integers(1, 4)])
            with scenes.use(*places[number]) as scene:
                assert isinstance(scene, WholeScene)
                before = name_of(scene), int(scene.images[0].sum())
                time.sleep(0.0005)
                assert (name_of(scene), int(scene.images[0].sum())) == before
                assert before[0] == places[number][1].aoi
                seen += 1
        return seen

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [60] * 8
    assert any("+" in read for read in reader.reads)
