"""The loader: it yields the content of the shards, in the order of order.py."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from models.config import ModelConfig
from pipeline.config import DataConfig
from pipeline.data import ChipDataset, TrainLoader, evaluation_batches
from pipeline.data.batches import collate
from pipeline.data.chips import chip_window, training_draws, training_variant, turn_and_flip
from pipeline.order import BatchPlan, Shuffle, epoch_batches
from sharding.errors import UserError
from sharding.format.index import Index
from sharding.format.layout import ChipGrid
from sharding.format.sample import fetch_sample
from sharding.prepare.options import STEP, SampleOptions
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage
from tests.chips import training_chip
from tests.conftest import S3
from tests.format2 import to_format_2


def loader(dataset: ChipDataset, plan: BatchPlan, rank: int = 0) -> TrainLoader:
    return TrainLoader(dataset, plan, rank, seed=5)


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
        draws = training_draws(chip + 1, seed, epoch)[chip]
        return training_variant(chip, draws, lr_size=(160, 160), scale=3.125, revisits=8, windows=True, turns=True)

    drawn = [draw(chip, 1, 0) for chip in range(300)]
    assert draw(7, 1, 0) == drawn[7]
    assert draw(7, 1, 1) != drawn[7]
    assert draw(7, 2, 0) != drawn[7]
    assert max(v.window.x for v in drawn) == 110
    assert all(v.window.hr_x + v.window.hr_size <= 500 and v.window.hr_y + v.window.hr_size <= 500 for v in drawn)
    assert {v.quarter_turns for v in drawn} == {0, 1, 2, 3}
    assert {v.revisit for v in drawn} == set(range(8))


@pytest.mark.parametrize(("lr_size", "hr_size"), [(156, 1053), (156, 117), (150, 471), (200, 131), (151, 450)])
def test_windows_of_any_grids_stay_inside(lr_size: int, hr_size: int) -> None:
    scale = hr_size / lr_size
    windows, sides = [chip_window(chip, scale) for chip in range(9)], (lr_size, lr_size)
    windows += [
        training_variant(n, draws, lr_size=sides, scale=scale, revisits=1, windows=True, turns=False).window
        for n, draws in enumerate(training_draws(3000, 1, 0))
    ]
    for window in windows:
        assert max(window.x, window.y) + window.size <= lr_size
        assert max(window.hr_x, window.hr_y) + window.hr_size <= hr_size
    assert max(window.x for window in windows) == lr_size - 50


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three AOIs of few pixels."""
    folder = tmp_path_factory.mktemp("source")
    write_worldstrat(folder, 3, seed=2, revisits=2, hr_side=80)
    return folder


def sharded(source: Path, output: Path, **options: object) -> str:
    sample = SampleOptions(revisits=2, **options)  # type: ignore[arg-type]
    shard_folder(source, open_storage(output), ShardOptions(sample=sample))
    return str(output)


def test_reflectance_is_the_same_from_integers_and_from_floats(source: Path, tmp_path: Path) -> None:
    integers, floats = (
        ChipDataset(sharded(source, tmp_path / dtype, dtype=dtype), "train", DataConfig())
        for dtype in ("uint16", "float32")
    )
    for chip in (0, 8):
        ours, theirs = (training_chip(dataset, chip, seed=1, epoch=0) for dataset in (integers, floats))
        for name in ("lr", "pan", "hr"):
            image, exact = getattr(ours, name), getattr(theirs, name)
            assert image.dtype == exact.dtype == torch.float32
            assert (image - exact).abs().max() <= STEP / 2 + 1e-7


def test_other_grids_give_chips_of_their_scale(source: Path, tmp_path: Path) -> None:
    dataset = ChipDataset(sharded(source, tmp_path / "out", lr_size=170, hr_size=340), "train", DataConfig())
    dataset.check_fits(ModelConfig(revisits=2))
    batch = training_chip(dataset, 8, seed=1, epoch=0)
    assert batch.lr.shape == (1, 2, 3, 50, 50)
    assert batch.pan.shape == (1, 1, 100, 100)
    assert batch.hr.shape == (1, 3, 100, 100)


def test_scenes_without_room_for_nine_chips_have_fewer(source: Path, tmp_path: Path) -> None:
    dataset = ChipDataset(sharded(source, tmp_path / "out", lr_size=149, hr_size=298), "train", DataConfig())
    assert (dataset.grid.size, dataset.chips_per_scene) == (50, 4)
    assert dataset[3].hr.shape == (1, 3, 100, 100)


def test_evaluation_yields_the_stored_values(dataset_uri: str) -> None:
    storage = open_storage(dataset_uri)
    index = Index.load(storage)
    (shard, entry), *_ = index.samples("test")
    stored = fetch_sample(storage, shard, entry)
    dataset = ChipDataset(dataset_uri, "test", DataConfig())
    batches = [batch for batch, counts in evaluation_batches(dataset) if counts]
    assert [batch.chips for batch in batches] == [(chip,) for chip in range(9)]
    chip5 = batches[5]
    assert torch.equal(chip5.lr[0], torch.tensor(stored.lr[:, :, 100:150, 50:100]).float() * 3e-5)
    assert torch.equal(chip5.hr[0], torch.tensor(stored.hr[:, 312:468, 156:312]).float() * 3e-5)
    assert torch.equal(chip5.pan[0], torch.tensor(stored.pan[:, 312:468, 156:312]).float() * 3e-5)
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


def test_torchs_loader_with_processes_gives_the_same_batches(dataset_uri: str) -> None:
    dataset = ChipDataset(dataset_uri, "train", DataConfig(random_windows=True))
    ours = loader(dataset, BatchPlan.create(8, 4, 2), rank=1)
    epoch = ours.epoch_batches(1, first_step=1)
    theirs = DataLoader(epoch, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    for mine, batch in zip(ours.batches(1, first_step=1), theirs, strict=True):
        assert batch.chips == mine.chips
        assert all(torch.equal(a, b) for a, b in zip(batch.tensors, mine.tensors, strict=True))


def test_a_split_is_a_dataset_of_torch(dataset_uri: str) -> None:
    dataset = ChipDataset(dataset_uri, "test", DataConfig())
    batch = next(iter(DataLoader(dataset, batch_size=4, collate_fn=collate)))
    assert batch.chips == (0, 1, 2, 3)
    assert batch.lr.shape == (4, 8, 3, 50, 50)
    assert len(dataset) == dataset.num_chips == 9
    with pytest.raises(IndexError, match="chip 9 of 9"):
        dataset[9]


def test_the_state_carries_the_position_to_another_world(dataset_uri: str) -> None:
    dataset = ChipDataset(dataset_uri, "train", DataConfig())
    plan = BatchPlan.create(8, 8, 1)
    first = loader(dataset, plan)
    whole = [batch.chips for epoch in range(2) for batch in first.batches(epoch)]
    taken = [next(iter(first)).chips]
    for _, batch in zip(range(2), first, strict=False):
        taken.append(batch.chips)
    state = json.loads(json.dumps(first.state_dict()))
    ranks = [loader(dataset, BatchPlan.create(8, 4, 2), rank) for rank in (0, 1)]
    for rank in ranks:
        rank.load_state_dict(state)
    for _ in range(2):
        for parts in zip(*ranks, strict=True):
            taken.append(parts[0].chips + parts[1].chips)
    assert taken == whole
    with pytest.raises(UserError, match="another seed \\(5, now 6\\)"):
        TrainLoader(dataset, plan, 0, seed=6).load_state_dict(state)


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
    assert [b.chips for b in loader(ChipDataset(dataset_uri, "train", none), plan).batches(0)] == ample


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


def test_a_dataset_of_format_2_gives_the_same_chips_in_its_own_order(small_uri: str, tmp_path: Path) -> None:
    shutil.copytree(small_uri, tmp_path / "old")
    data = to_format_2(tmp_path / "old")
    new, old = (ChipDataset(uri, "train", DataConfig()) for uri in (small_uri, str(tmp_path / "old")))
    assert old.index.digest == hashlib.sha256(data).hexdigest() != new.index.digest
    assert (old.grid, old.layout, old.scale, old.num_chips) == (new.grid, new.layout, new.scale, new.num_chips)
    for theirs, ours in zip(old[7].tensors, new[7].tensors, strict=True):
        assert torch.equal(theirs, ours)
    order = TrainLoader(old, BatchPlan.create(4, 0, 1), 0, seed=1).order(0)
    sizes = [len(shard.samples) for shard in old.shards]
    assert np.array_equal(order, epoch_batches(sizes, old.index.digest, 1, 0, 4, Shuffle(4, 8)))


def test_chips_of_another_grid() -> None:
    grid = ChipGrid(size=16, stride=8, columns=3, rows=2)
    windows = [chip_window(chip, 4.0, grid) for chip in range(grid.count)]
    assert [(window.x, window.y) for window in windows] == [(0, 0), (0, 8), (8, 0), (8, 8), (16, 0), (16, 8)]
    assert {(window.size, window.hr_size) for window in windows} == {(16, 64)}
    assert [window.hr_x for window in windows] == [0, 0, 32, 32, 64, 64]
    chips = epoch_batches([2, 1], "digest", 1, 0, 6, Shuffle(), chips_per_scene=6)
    assert sorted(chips.ravel().tolist()) == list(range(18))
