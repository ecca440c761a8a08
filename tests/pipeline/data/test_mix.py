"""Datasets of one geometry as one: the order, its weights, and what is refused."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import DataConfig, RunConfig, load_config, split_weight
from pipeline.data import BatchPlan, ChipDataset, TrainLoader
from pipeline.data.mix import _mixed
from pipeline.order import Shuffle, epoch_batches, epoch_chips, stretches
from sharding.errors import UserError
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.run.plan import PlanOptions
from sharding.run.splits import SPLIT_SEED
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage
from tests.datasets import made_once

SMALL = SampleOptions(revisits=2, lr_size=150, hr_size=200)
CONFIG = DataConfig(loader_threads=2, prefetch_batches=2)


def written(folder: Path, seed: int, sample: SampleOptions = SMALL, *, split_seed: int = SPLIT_SEED) -> None:
    """Shard four generated AOIs, named Own-<seed>-<number>."""
    source = folder.with_name(f"{folder.name}-source")
    for number, name in enumerate(write_worldstrat(source, 4, seed=seed, revisits=2, hr_side=80)):
        for path in sorted(source.rglob(f"*{name}*"), key=lambda path: -len(path.parts)):
            path.rename(path.with_name(path.name.replace(name, f"Own-{seed}-{number}")))
    options = ShardOptions(sample, PlanOptions(splits="seeded", seed=split_seed, shard_bytes=1_300_000))
    shard_folder(source, open_storage(folder), options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two datasets of four AOIs each, of other names: 2 for training, 18 chips."""
    one, two = (made_once(tmp_path_factory, f"mix-{seed}", lambda path, n=seed: written(path, n)) for seed in (5, 6))
    return str(one), str(two)


def ids(data: ChipDataset, batches: Sequence[Sequence[int]]) -> list[str]:
    return [data.chip_id(chip) for batch in batches for chip in batch]


def test_one_pass_over_all_is_the_order_of_one_dataset() -> None:
    sizes = [3, 2, 4]
    for epoch in range(2):
        plain = epoch_chips(sizes, "d", 1, epoch, 2)
        assert np.array_equal(plain, epoch_chips(sizes, "d", 1, epoch, 2, passes=(1.0, 1.0, 1.0)))


def test_passes_are_kept_exactly() -> None:
    sizes, passes = [3, 2, 1, 1, 1], (2.0, 2.0, 0.25, 0.25, 0.25)
    total = 9 * sum(sizes)
    taken = [stretch.taken for stretch in stretches(sizes, 9, passes)]
    assert sum(taken) == 2 * 45 + 6  # a quarter of 27, rounded down
    seen: Counter[int] = Counter()
    for epoch in range(40):
        chips = epoch_chips(sizes, "d", 1, epoch, 2, passes=passes)
        assert len(chips) == len(set(chips.tolist())) == sum(taken)
        counts = Counter((chips % total).tolist())
        assert all(counts[chip] == 2 for chip in range(45))
        seen.update(chip for chip in counts if chip >= 45)
    # A broken pass takes other chips in each epoch, and leaves none out for ever.
    assert len(seen) == 27
    assert max(seen.values()) < 40


def test_the_order_of_a_mix_does_not_depend_on_the_world(pair: tuple[str, str]) -> None:
    data = ChipDataset([f"{pair[0]}*2", f"{pair[1]}*0.5"], "train", CONFIG)
    orders = []
    for world in (1, 2, 4):
        plan = BatchPlan.create(4, 0, world)
        loaders = [TrainLoader(data, plan, rank, seed=1) for rank in range(world)]
        assert loaders[0].steps_per_epoch == (2 * 18 + 9) // 4
        parts = [[list(batch.chips) for batch in loader.batches(1)] for loader in loaders]
        orders.append([list(itertools.chain(*step)) for step in zip(*parts, strict=True)])
    assert orders[0] == orders[1] == orders[2]
    names = Counter(name.partition("/")[0] for name in ids(data, orders[0]))
    assert names["0"] + names["1"] == 44
    assert names["0"] in (35, 36)


def test_a_mix_resumes_within_an_epoch(pair: tuple[str, str]) -> None:
    def loader(weight: str = "1.5", world: int = 1) -> TrainLoader:
        data = ChipDataset([f"{pair[0]}*{weight}", pair[1]], "train", CONFIG)
        return TrainLoader(data, BatchPlan.create(4, 0, world), 0, seed=3)

    first = loader()
    batches = [batch for batch, _ in zip(first, range(5), strict=False)]
    resumed = loader()
    resumed.load_state_dict({**first.state_dict(), "step": 2})
    for batch, expected in zip(resumed, batches[2:], strict=False):
        assert batch.chips == expected.chips
        assert torch.equal(batch.lr, expected.lr)
    with pytest.raises(UserError, match="another index digest"):
        loader("2").load_state_dict(first.state_dict())


def test_chips_are_those_of_their_datasets(pair: tuple[str, str]) -> None:
    data = ChipDataset([pair[0], f"{pair[1]}*2"], "train", CONFIG)
    alone = [ChipDataset(uri, "train", CONFIG) for uri in pair]
    loader = TrainLoader(data, BatchPlan.create(6, 0, 1), 0, seed=1)
    turned = 0
    for batch in loader.batches(0):
        for slot, chip in enumerate(batch.chips):
            part, name = data.chip_id(chip).split("/", 1)
            other = alone[int(part)]
            number = next(n for n in range(other.num_chips) if other.chip_id(n) == name)
            expected = other.evaluation_batch(number)
            assert batch.hr[slot].sum().item() == pytest.approx(expected.hr.sum().item(), rel=1e-5)
            turned += not torch.equal(batch.hr[slot], expected.hr[0])
    assert turned
    assert data.sibling("val").num_chips == sum(other.sibling("val").num_chips for other in alone)


def test_an_aoi_that_two_datasets_hold_is_one_place_whatever_its_name(pair: tuple[str, str]) -> None:
    data = ChipDataset([pair[0], pair[0]], "train", CONFIG)
    alone = ChipDataset(pair[0], "train", CONFIG)
    assert [data.aoi(chip) for chip in (0, alone.num_chips)] == [f"{part}/{alone.aoi(0)}" for part in (0, 1)]
    assert [data.place(chip) for chip in (0, alone.num_chips)] == [alone.aoi(0)] * 2
    slashed = "1/a/b"
    vars(alone._place(0)[1])["aoi"] = slashed  # as [[scene]] of scenes.toml may name it
    assert alone.place(0) == slashed
    renamed = _mixed([alone.index, alone.index], (1.0, 2.0))
    entries = [entry for _, entry in renamed.samples("train") if entry.aoi.endswith(slashed)]
    assert [entry.aoi for entry in entries] == ["0/1/a/b", "1/1/a/b"]


def test_passes_differ_in_their_augmentation(pair: tuple[str, str]) -> None:
    data = ChipDataset([f"{pair[0]}*8"], "train", CONFIG)
    loader = TrainLoader(data, BatchPlan.create(8, 0, 1), 0, seed=1)
    found: dict[str, set[bytes]] = {}
    for batch in loader.batches(0):
        for slot, chip in enumerate(batch.chips):
            found.setdefault(data.chip_id(chip), set()).add(batch.pan[slot].numpy().tobytes())
    assert all(len(images) > 2 for images in found.values())


def test_another_geometry_is_refused(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    def make(path: Path) -> None:
        written(path, 7, replace(SMALL, revisits=1, dtype="float32"))

    other = str(made_once(tmp_path_factory, "mix-other", make))
    with pytest.raises(
        UserError, match=r"differ in revisits \(2 and 1\); radiometry .*; type of values \(uint16 and f"
    ):
        ChipDataset([pair[0], other], "train", CONFIG)


def test_an_aoi_in_two_splits_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    written(tmp_path / "other", 5, split_seed=1)
    with pytest.raises(UserError, match=r"AOI 'Own-5-\d' is in (train|val|test) of .* and in (train|val|test) of "):
        ChipDataset([pair[0], str(tmp_path / "other")], "train", CONFIG)


def test_the_configuration_takes_lists(tmp_path: Path) -> None:
    config = load_config("demo", ['data.uri=["a*2", "s3://b/c"]'])
    assert config.data.uri == ("a*2", "s3://b/c")
    assert config.data.uris == ("a", "s3://b/c")
    absolute = config.with_absolute_uris(tmp_path)
    assert absolute.data.uri == (str(tmp_path / "a*2"), "s3://b/c")
    (tmp_path / "run.toml").write_text(absolute.to_toml())
    assert load_config(str(tmp_path / "run.toml")) == absolute
    assert RunConfig.from_dict(absolute.to_dict()) == absolute
    assert load_config("demo", ["data.uri=2024"]).data.uri == "2024"


@pytest.mark.parametrize(
    ("text", "expected"), [("a*2", ("a", 2.0)), ("a*b", ("a*b", 1.0)), ("s3://a/*/b*.5", ("s3://a/*/b", 0.5))]
)
def test_weights_stand_after_a_star(text: str, expected: tuple[str, float]) -> None:
    assert split_weight(text) == expected


@pytest.mark.parametrize("weight", ["0", "-1", "1001", "nan", "inf"])
def test_weights_out_of_range_are_refused(weight: str) -> None:
    with pytest.raises(UserError, match=r"data\.uri: the weight of a = .* is out of range: it must be above 0"):
        load_config("demo", [f'data.uri=["a*{weight}"]'])


def test_batches_hold_no_chip_twice() -> None:
    sizes, passes = [2, 2], (3.0, 1.0)
    batches = epoch_batches(sizes, "d", 0, 0, 6, Shuffle(), 9, passes)
    assert len(set(batches.ravel().tolist())) == batches.size == 6 * ((3 * 18 + 18) // 6)
