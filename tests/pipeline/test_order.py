"""The order of chips: exact, and the same for any world."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import (
    BatchPlan,
    Shuffle,
    epoch_batches,
    epoch_chips,
    evaluation_slots,
    permutation,
    rank_slots,
    steps_per_epoch,
)
from sharding.errors import UserError

layouts = st.lists(st.integers(1, 6), min_size=1, max_size=12)


@settings(deadline=None)  # a machine may be busy
@given(layouts, st.integers(0, 2**31), st.integers(0, 50), st.integers(1, 20))
def test_every_chip_once_an_epoch(layout: list[int], seed: int, epoch: int, window: int) -> None:
    chips = epoch_chips(layout, "digest", seed, epoch, window)
    assert sorted(chips.tolist()) == list(range(9 * sum(layout)))


shuffles = st.builds(Shuffle, window=st.integers(1, 5), lanes=st.integers(1, 16))


@settings(deadline=None)  # a machine may be busy
@given(layouts, shuffles, st.integers(1, 16), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.data())
def test_ranks_join_to_the_same_global_batches(
    layout: list[int], shuffle: Shuffle, world: int, micro: int, accumulation: int, epoch: int, data: st.DataObject
) -> None:
    """In any world, from any step on, ranks take equal steps, and together the chips of a single rank."""
    plan = BatchPlan.create(world * micro * accumulation, micro, world)
    assert plan.micro_batch * plan.grad_accum * plan.world_size == plan.global_batch
    batches = epoch_batches(layout, "digest", 1, epoch, plan.global_batch, shuffle)
    steps = steps_per_epoch(9 * sum(layout), plan.global_batch)
    assert batches.shape == (steps, plan.global_batch)
    first = data.draw(st.integers(0, steps))
    joined = np.concatenate([rank_slots(batches, plan, rank)[first:] for rank in range(world)], axis=1)
    assert joined.tolist() == batches[first:].tolist()
    other = data.draw(st.sampled_from([n for n in range(1, 17) if plan.global_batch % n == 0]))
    elsewhere = BatchPlan.create(plan.global_batch, 0, other)
    again = epoch_batches(layout, "digest", 1, epoch, elsewhere.global_batch, shuffle)
    rest = np.concatenate([rank_slots(again, elsewhere, rank)[first:] for rank in range(other)], axis=1)
    assert rest.tolist() == joined.tolist()


@settings(deadline=None)  # a machine may be busy
@given(layouts, shuffles, st.integers(1, 40), st.integers(0, 2**31))
def test_a_chip_comes_once_and_the_tail_is_less_than_a_batch(
    layout: list[int], shuffle: Shuffle, batch: int, seed: int
) -> None:
    chips = epoch_batches(layout, "digest", seed, 0, batch, shuffle).ravel().tolist()
    assert len(set(chips)) == len(chips) > 9 * sum(layout) - batch
    assert set(chips) <= set(range(9 * sum(layout)))


def test_ranks_read_few_shards_of_each_other() -> None:
    layout = [19] * 200
    batches = epoch_batches(layout, "digest", 1, 0, 32, Shuffle(window=4, lanes=8))
    for world, most in ((1, 200), (2, 204), (4, 212), (8, 228)):
        plan = BatchPlan.create(32, 4, world)
        read = [np.unique(rank_slots(batches, plan, rank) // 9 // 19) for rank in range(world)]
        assert 200 <= sum(map(len, read)) <= most


@settings(deadline=None)  # a machine may be busy
@given(st.integers(1, 60), st.integers(1, 16))
def test_evaluation_covers_each_chip_once_and_ranks_take_equal_turns(num_chips: int, world: int) -> None:
    dealt = [evaluation_slots(num_chips, rank, world) for rank in range(world)]
    assert len({len(slots) for slots in dealt}) == 1
    counted = [chip for slots in dealt for chip, counts in slots if counts]
    assert sorted(counted) == list(range(num_chips))


def test_what_the_order_depends_on() -> None:
    base = epoch_chips([5, 5, 5], "a", 1, 0, 2).tolist()
    for digest, seed, epoch, window in (("b", 1, 0, 2), ("a", 2, 0, 2), ("a", 1, 1, 2), ("a", 1, 0, 3)):
        assert epoch_chips([5, 5, 5], digest, seed, epoch, window).tolist() != base


def test_the_shuffle_is_pinned() -> None:
    # A change here would make every running job resume at wrong chips.
    assert permutation(8, "digest", 1, 0, "shards").tolist() == [6, 7, 4, 3, 2, 1, 0, 5]
    first = epoch_batches([2, 1, 2], "digest", 1, 0, 8, Shuffle(2, 4))[0]
    assert first.tolist() == [34, 28, 22, 42, 38, 19, 8, 2]


@pytest.mark.parametrize(
    ("batch", "world", "words"),
    [(8, 3, "8 is not divisible by 3 ranks: set train.global_batch to a multiple of 3, or train with 2 or 4 ranks"),
     (2, 4, "2 is not divisible by 4 ranks: set train.global_batch to a multiple of 4, or train with 2 ranks")],
)  # fmt: skip
def test_a_batch_that_does_not_divide_is_refused(batch: int, world: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        BatchPlan.create(batch, 0, world)


@settings(deadline=None)  # a machine may be busy
@given(st.integers(1, 200), st.integers(0, 200), st.integers(1, 64))
def test_the_micro_batch_is_an_upper_bound(batch: int, bound: int, world: int) -> None:
    """Any world that divides the global batch trains it, with the largest micro-batch that fits."""
    batch *= world
    plan = BatchPlan.create(batch, bound, world)
    assert plan.micro_batch * plan.grad_accum * world == batch
    largest = min(bound or plan.per_rank, plan.per_rank)
    assert plan.micro_batch == max(size for size in range(1, largest + 1) if plan.per_rank % size == 0)
