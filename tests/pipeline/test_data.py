"""The loader: what it yields is what the shards hold, in the order that order.py says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.registry import ModelConfig
from pipeline.chips import chip_window, training_variant, turn_and_flip
from pipeline.config import DataConfig
from pipeline.data import ChipDataset, SceneCache, TrainLoader, collate, evaluation_batches
from pipeline.order import BatchPlan
from sharding.errors import UserError
from sharding.schema import Index, Sample, read_sample
from sharding.storage import open_storage
from tests.conftest import S3


def loader(dataset: ChipDataset, plan: BatchPlan, rank: int = 0, config: DataConfig | None = None) -> TrainLoader:
    return TrainLoader(dataset, plan, rank, seed=5, config=config or DataConfig())


def copy_to(uri: str, target: str) -> None:
    source, destination = open_storage(uri), open_storage(target)
    for stored in source.list():
        destination.write(stored.key, source.read(stored.key))


def test_windows_are_the_contracts() -> None:
    starts = [(window.x, window.y, window.hr_x, window.hr_y) for window in (chip_window(c, 3.125) for c in range(9))]
    assert starts[:4] == [(0, 0, 0, 0), (0, 50, 0, 156), (0, 100, 0, 312), (50, 0, 156, 0)]
    assert {chip_window(c, 3.125).hr_size for c in range(9)} == {156}


def test_a_turn_is_counter_clockwise_and_the_flip_reverses_rows() -> None:
    image = torch.tensor([[[1, 2], [3, 4]]])
    assert turn_and_flip(image, 1, False).tolist() == [[[2, 4], [1, 3]]]
    assert turn_and_flip(image, 0, True).tolist() == [[[3, 4], [1, 2]]]


def test_random_windows_stay_inside_and_depend_on_seed_epoch_and_chip_alone() -> None:
    def draw(chip: int, seed: int, epoch: int):
        return training_variant(chip, seed, epoch, lr_size=160, scale=3.125, revisits=8, windows=True, turns=True)

    drawn = [draw(chip, 1, 0) for chip in range(300)]
    assert draw(7, 1, 0) == drawn[7]
    assert draw(7, 1, 1) != drawn[7]
    assert draw(7, 2, 0) != drawn[7]
    assert max(v.window.x for v in drawn) == 110
    assert all(v.window.hr_x + v.window.hr_size <= 500 and v.window.hr_y + v.window.hr_size <= 500 for v in drawn)
    assert {v.quarter_turns for v in drawn} == {0, 1, 2, 3}
    assert {v.revisit for v in drawn} == set(range(8))


def test_evaluation_yields_the_stored_values(dataset_uri: str) -> None:
    storage = open_storage(dataset_uri)
    index = Index.load(storage)
    (shard, entry), *_ = index.samples("test")
    stored = read_sample(storage, shard, entry)
    dataset = ChipDataset(dataset_uri, "test", DataConfig())
    batches = [batch for batch, counts in evaluation_batches(dataset) if counts]
    assert [batch.chips for batch in batches] == [(chip,) for chip in range(9)]
    chip5 = batches[5]
    assert torch.equal(chip5.lr[0], torch.as_tensor(stored.lr[:, :, 100:150, 50:100]).float() * 3e-5)
    assert torch.equal(chip5.hr[0], torch.as_tensor(stored.hr[:, 312:468, 156:312]).float() * 3e-5)
    assert torch.equal(chip5.pan[0], torch.as_tensor(stored.pan[:, 312:468, 156:312]).float() * 3e-5)
    assert chip5.revisit.tolist() == [stored.meta["clearest"]]


def test_two_ranks_get_the_parts_of_one_ranks_batches(dataset_uri: str) -> None:
    dataset = ChipDataset(dataset_uri, "train", DataConfig(random_windows=True))
    alone = list(loader(dataset, BatchPlan.create(8, 8, 1)).batches(epoch=1))
    parts = [list(loader(dataset, BatchPlan.create(8, 2, 2), rank).batches(epoch=1)) for rank in (0, 1)]
    assert len(alone) == 4  # 36 chips, 4 of the tail dropped
    for whole, first, second in zip(alone, *parts, strict=True):
        joined = collate([first, second])
        assert joined.chips == whole.chips
        assert torch.equal(joined.lr, whole.lr)
        assert torch.equal(joined.hr, whole.hr)
        assert torch.equal(joined.pan, whole.pan)


def test_going_on_at_a_step_yields_what_was_left(dataset_uri: str) -> None:
    dataset = ChipDataset(dataset_uri, "train", DataConfig())
    plan = BatchPlan.create(4, 4, 1)
    whole = list(loader(dataset, plan).batches(2))
    rest = list(loader(dataset, plan).batches(2, first_step=6))
    assert [batch.chips for batch in rest] == [batch.chips for batch in whole[6:]]
    assert torch.equal(rest[0].lr, whole[6].lr)


def test_s3_yields_the_same_batches(dataset_uri: str, s3: S3) -> None:
    target = s3.prefix()
    copy_to(dataset_uri, target)
    plan = BatchPlan.create(8, 8, 1)
    here = next(loader(ChipDataset(dataset_uri, "train", DataConfig()), plan).batches(0))
    there = next(loader(ChipDataset(target, "train", DataConfig()), plan).batches(0))
    assert here.chips == there.chips
    assert torch.equal(here.lr, there.lr)


def test_a_cache_of_any_size_yields_the_same(dataset_uri: str) -> None:
    plan = BatchPlan.create(8, 8, 1)
    ample = [b.chips for b in loader(ChipDataset(dataset_uri, "train", DataConfig()), plan).batches(0)]
    none = DataConfig(cache_mib=0, loader_threads=3)
    assert [b.chips for b in loader(ChipDataset(dataset_uri, "train", none), plan, config=none).batches(0)] == ample


def test_the_cache_keeps_to_its_bound_and_reads_a_held_scene_once(dataset_uri: str) -> None:
    storage = open_storage(dataset_uri)
    places = Index.load(storage).samples("train")
    reads: list[str] = []

    class Counting:
        def __getattr__(self, name: str):
            return getattr(storage, name)

        def read_range(self, key: str, offset: int, length: int) -> bytes:
            reads.append(key)
            return storage.read_range(key, offset, length)

    sample = read_sample(storage, *places[0])
    size = sum(np.asarray(image).nbytes for image in (sample.lr, sample.clm, sample.hr, sample.pan))
    cache = SceneCache(Counting(), limit_bytes=2 * size)  # type: ignore[arg-type]
    for number in (0, 1, 0, 1, 2, 1):
        assert isinstance(cache.get(*places[number]), Sample)
    assert len(reads) == 3
    cache.get(*places[0])  # pushed out by 2, as the least recently used
    assert len(reads) == 4


def test_a_damaged_scene_is_named(dataset_uri: str, tmp_path: Path) -> None:
    copy_to(dataset_uri, str(tmp_path))
    index = Index.load(open_storage(tmp_path))
    shard, entry = index.samples("train")[0]
    path = tmp_path / shard.name
    data = bytearray(path.read_bytes())
    data[entry.offset + 2000] ^= 1
    path.write_bytes(data)
    dataset = ChipDataset(str(tmp_path), "train", DataConfig())
    with pytest.raises(UserError, match=entry.aoi):
        list(loader(dataset, BatchPlan.create(36, 36, 1)).batches(0))


def test_a_batch_larger_than_the_split_is_refused(dataset_uri: str) -> None:
    dataset = ChipDataset(dataset_uri, "train", DataConfig())
    with pytest.raises(UserError, match=r"train\.global_batch = 37 is more than the 36 chips"):
        loader(dataset, BatchPlan.create(37, 37, 1))


def test_a_uri_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no index\.json"):
        ChipDataset(str(tmp_path), "train", DataConfig())
    with pytest.raises(UserError, match=r"data\.uri is empty"):
        ChipDataset("", "train", DataConfig())


def test_chips_of_a_size_that_a_model_cannot_take_are_refused(dataset_uri: str) -> None:
    dataset = ChipDataset(dataset_uri, "train", DataConfig())
    published = ModelConfig("none", "arconv", published=True)
    dataset.check_fits(published)
    dataset.scale = 2.5
    with pytest.raises(UserError, match=r"chips of .+ do not fit: .+125"):
        dataset.check_fits(published)
    dataset.check_fits(replace(published, published=False))
