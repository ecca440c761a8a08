"""The order of chips: exact, and the same for any world."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.order import (
    BatchPlan,
    epoch_chips,
    evaluation_slots,
    permutation,
    rank_slots,
    steps_per_epoch,
)
from sharding.errors import UserError

layouts = st.lists(st.integers(1, 6), min_size=1, max_size=12)


@given(layouts, st.integers(0, 2**31), st.integers(0, 50), st.integers(1, 20))
def test_every_chip_once_an_epoch(layout: list[int], seed: int, epoch: int, window: int) -> None:
    chips = epoch_chips(layout, "digest", seed, epoch, window)
    assert sorted(chips.tolist()) == list(range(9 * sum(layout)))


@given(layouts, st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 12]))
def test_ranks_join_to_the_same_global_batches(layout: list[int], world: int, micro: int) -> None:
    if 12 % (world * micro):
        micro = 1
    plan = BatchPlan.create(12, micro, world)
    alone = BatchPlan.create(12, 12, 1)
    chips = epoch_chips(layout, "digest", 1, 0, 3)
    for step in range(steps_per_epoch(len(chips), 12)):
        joined = np.concatenate([rank_slots(chips, step, plan, rank) for rank in range(world)])
        assert joined.tolist() == rank_slots(chips, step, alone, 0).tolist()
    assert plan.micro_batch * plan.grad_accum * plan.world_size == plan.global_batch


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
    # A change here would send every running job's resumption astray.
    assert permutation(8, "digest", 1, 0, "shards").tolist() == [6, 7, 4, 3, 2, 1, 0, 5]


@pytest.mark.parametrize(("batch", "micro", "world"), [(8, 3, 1), (8, 0, 3), (8, 4, 4), (2, 0, 4)])
def test_a_batch_that_does_not_divide_is_refused(batch: int, micro: int, world: int) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch = \d+ is not divisible by ranks x micro batch"):
        BatchPlan.create(batch, micro, world)
