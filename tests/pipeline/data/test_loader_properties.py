"""Any number of ranks, threads, processes, shards, from any step on: batches equal to the bit, each chip once."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache
from itertools import islice
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import DataConfig
from pipeline.data import ChipDataset, TrainLoader, evaluation_batches
from pipeline.data.batches import Batch, collate
from pipeline.order import BatchPlan
from sharding.errors import UserError
from tests.chips import training_chip

CHIPS = 45
SEED = 7
few_examples = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])

layouts = st.sampled_from([1, 3, 5])
worlds = st.integers(1, 16)
readers = st.fixed_dictionaries(
    {
        "loader_threads": st.integers(1, 3),
        "prefetch_batches": st.integers(1, 4),
        "cache_mib": st.sampled_from([0, 64]),
    }
)
"""Settings that may differ between the ranks and worlds of one run."""
orders = st.fixed_dictionaries(
    {
        "lanes": st.integers(1, 16),
        "shuffle_window": st.integers(1, 6),
        "random_windows": st.booleans(),
        "simulate": st.sampled_from(["off", "shifts"]),
    }
)


@st.composite
def plans(draw: st.DrawFn, global_batch: int | None = None) -> BatchPlan:
    """Draw any world of up to 16 ranks, and any micro batch; of ``global_batch`` chips if given."""
    if global_batch is None:
        world = draw(worlds)
        per_rank = draw(st.integers(1, CHIPS // world))
    else:
        world = draw(st.sampled_from([size for size in range(1, 17) if global_batch % size == 0]))
        per_rank = global_batch // world
    micro = draw(st.sampled_from([size for size in range(1, per_rank + 1) if per_rank % size == 0]))
    return BatchPlan.create(world * per_rank, micro, world)


@cache
def chips_one_by_one(uri: str, random_windows: bool, simulate: str, epoch: int) -> list[Batch]:
    """Return each chip of an epoch, made alone and without a loader."""
    dataset = ChipDataset(uri, "train", DataConfig(random_windows=random_windows, simulate=simulate))
    return [training_chip(dataset, chip, SEED, epoch) for chip in range(CHIPS)]


def equal(ours: Batch, theirs: Batch) -> bool:
    return ours.chips == theirs.chips and all(map(torch.equal, ours.tensors, theirs.tensors))


def take(loader: TrainLoader, steps: int) -> list[Batch]:
    with closing(cast(Any, iter(loader))) as batches:
        return list(islice(batches, steps))


def take_by_workers(loader: TrainLoader, workers: int) -> list[Batch]:
    """Return the rest of an epoch from processes of torch's loader, each with a copy and every nth batch."""
    epoch, first = divmod(loader.step, loader.steps_per_epoch)
    copies = [pickle.dumps(loader.epoch_batches(epoch, first))] * workers
    readers = [cast(Sequence[Batch], pickle.loads(copy)) for copy in copies]  # noqa: S301
    return [readers[step % workers][step] for step in range(len(readers[0]))]


@few_examples
@given(
    layout=layouts, order=orders, threads=st.tuples(readers, readers), before=plans(), epoch=st.integers(0, 2),
    data=st.data(),
)  # fmt: skip
def test_a_run_that_goes_on_in_another_world_takes_what_one_rank_takes(
    shards: dict[int, str],
    layout: int,
    order: dict[str, Any],
    threads: tuple[dict[str, Any], dict[str, Any]],
    before: BatchPlan,
    epoch: int,
    data: st.DataObject,
) -> None:
    uri = shards[layout]
    first, second = (ChipDataset(uri, "train", DataConfig(**order, **own)) for own in threads)
    after = data.draw(plans(before.global_batch))
    steps = CHIPS // before.global_batch
    taken = data.draw(st.integers(0, steps - 1))

    loaders = [TrainLoader(first, before, rank, SEED) for rank in range(before.world_size)]
    for loader in loaders:
        loader.step = epoch * steps
    parts = [take(loader, taken) for loader in loaders]
    (state,) = {json.dumps(loader.state_dict()) for loader in loaders}
    assert len(state) < 400
    joined = [collate(ranks) for ranks in zip(*parts, strict=True)]

    loaders = [TrainLoader(second, after, rank, SEED) for rank in range(after.world_size)]
    for loader in loaders:
        loader.load_state_dict(json.loads(state))
    workers = data.draw(st.integers(0, 3))
    parts = [take_by_workers(loader, workers) if workers else list(loader) for loader in loaders]
    assert {len(batches) for batches in parts} == {steps - taken}
    assert {micro.lr.shape[0] for micro in parts[0][0].split(after.micro_batch)} == {after.micro_batch}
    joined += [collate(ranks) for ranks in zip(*parts, strict=True)]

    assert [batch.chips for batch in joined] == [tuple(batch) for batch in loaders[0].order(epoch).tolist()]
    chips = [chip for batch in joined for chip in batch.chips]
    assert len(set(chips)) == len(chips) == steps * before.global_batch > CHIPS - before.global_batch
    alone = chips_one_by_one(uri, order["random_windows"], order["simulate"], epoch)
    assert all(equal(batch, collate([alone[chip] for chip in batch.chips])) for batch in joined)


@few_examples
@given(layout=layouts, split=st.sampled_from(["train", "val"]), reader=readers, world=worlds)
def test_evaluation_counts_every_chip_once_and_no_rank_takes_another_number_of_turns(
    shards: dict[int, str], layout: int, split: str, reader: dict[str, Any], world: int
) -> None:
    dataset = ChipDataset(shards[layout], split, DataConfig(**reader))
    dealt = [list(evaluation_batches(dataset, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in dealt}) == 1
    counted = {batch.chips[0]: batch for batches in dealt for batch, counts in batches if counts}
    assert sum(counts for batches in dealt for _, counts in batches) == len(counted)
    assert list(counted) == list(range(len(dataset)))
    assert all(equal(batch, dataset[chip]) for chip, batch in counted.items())


def test_epochs_differ_in_order_and_in_what_they_show(shards: dict[int, str]) -> None:
    dataset = ChipDataset(shards[3], "train", DataConfig(random_windows=True))
    loader = TrainLoader(dataset, BatchPlan.create(9, 0, 1), 0, SEED)
    first, second = (collate(list(loader)) for _ in range(2))
    assert loader.step == 10
    assert sorted(first.chips) == sorted(second.chips) == list(range(CHIPS))
    assert first.chips != second.chips
    assert not torch.equal(first.hr[first.chips.index(0)], second.hr[second.chips.index(0)])


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("index digest", {"layout": 5}),
        ("split", {"split": "val"}),
        ("seed", {"seed": 8}),
        ("global batch", {"global_batch": 6}),
        ("shuffle window", {"shuffle_window": 3}),
        ("lanes", {"lanes": 4}),
    ],
)
def test_the_state_of_another_order_is_refused(shards: dict[int, str], what: str, other: Mapping[str, Any]) -> None:
    def loader(
        layout: int = 3, split: str = "train", seed: int = SEED, global_batch: int = 9, **options: int
    ) -> TrainLoader:
        dataset = ChipDataset(shards[layout], split, DataConfig(**options))  # type: ignore[arg-type]
        return TrainLoader(dataset, BatchPlan.create(global_batch, 0, 1), 0, seed)

    ours, theirs = loader(), loader(**other)
    theirs.step = 1
    with pytest.raises(UserError, match=f"the state is of another {what} \\(.+, now .+\\)"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.step == 0
