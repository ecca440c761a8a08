"""Which chips make up each global batch, and which rank takes which: pure functions on integers.

A chip is ``9 * sample + window`` with samples numbered in the index's order. The sequence depends on the index digest,
the seed, the epoch and the shuffle window alone, never on ranks, workers or restarts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sharding.errors import UserError

CHIPS_PER_SCENE = 9

Chips = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is spread: the only place where these four numbers meet."""

    global_batch: int
    """Chips per optimizer step over all ranks."""
    micro_batch: int
    """Chips per forward pass of one rank."""
    world_size: int
    """Ranks."""

    @classmethod
    def create(cls, global_batch: int, micro_batch: int, world_size: int) -> BatchPlan:
        """Derive the plan; ``micro_batch`` 0 means the whole of a rank's part at once.

        Raises:
            UserError: ``global_batch`` is no multiple of ``world_size * micro_batch``.
        """
        micro = micro_batch or max(1, global_batch // world_size)
        if global_batch % (world_size * micro):
            multiple = world_size * (micro_batch or 1)
            raise UserError(
                f"train.global_batch = {global_batch} is not divisible by ranks x micro batch = {world_size} x {micro}:"
                f" set train.global_batch to a multiple of {multiple}, or change train.micro_batch"
            )
        return cls(global_batch, micro, world_size)

    @property
    def per_rank(self) -> int:
        """Chips of one rank per optimizer step."""
        return self.global_batch // self.world_size

    @property
    def grad_accum(self) -> int:
        """Forward passes of one rank per optimizer step."""
        return self.per_rank // self.micro_batch


def random_words(count: int, *key: int | str) -> npt.NDArray[np.uint64]:
    """Return ``count`` uniform 64-bit words that depend on ``key`` alone (Philox, whose stream numpy keeps stable)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    words = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=words).random_raw(count)


def permutation(count: int, *key: int | str) -> Chips:
    """Return a permutation of ``range(count)`` that depends on ``key`` alone."""
    return np.argsort(random_words(count, *key), kind="stable").astype(np.int64)


def epoch_chips(samples_per_shard: Sequence[int], digest: str, seed: int, epoch: int, window: int) -> Chips:
    """Return the order of all chips of one epoch.

    Shards are permuted, then the chips of each run of ``window`` shards are shuffled together, so that a scene is read
    from a bounded stretch of the epoch.

    Args:
        samples_per_shard: Scenes in each shard of the split, in index order.
        digest: Digest of the index.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        window: Shards shuffled together.

    Returns:
        [9 * scenes] chip numbers, each once.
    """
    starts = np.concatenate([[0], np.cumsum(samples_per_shard)]).astype(np.int64)
    shards = permutation(len(samples_per_shard), digest, seed, epoch, "shards")
    parts: list[Chips] = []
    for first in range(0, len(shards), window):
        samples = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]])
        chips = (samples[:, None] * CHIPS_PER_SCENE + np.arange(CHIPS_PER_SCENE)).ravel()
        parts.append(chips[permutation(len(chips), digest, seed, epoch, "chips", first)])
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def steps_per_epoch(num_chips: int, global_batch: int) -> int:
    """Return the whole global batches in an epoch; the tail of ``num_chips % global_batch`` chips is dropped."""
    return num_chips // global_batch


def rank_slots(chips: Chips, step_in_epoch: int, plan: BatchPlan, rank: int) -> Chips:
    """Return the consecutive slots that ``rank`` takes of the global batch ``step_in_epoch`` (from 0)."""
    first = step_in_epoch * plan.global_batch + rank * plan.per_rank
    return chips[first : first + plan.per_rank]


def evaluation_slots(num_chips: int, rank: int, world_size: int) -> list[tuple[int, bool]]:
    """Return the chips ``rank`` evaluates as (chip, counts), dealt round robin.

    Every rank gets the same number, because ZeRO 3 gathers weights in each forward pass; a filler repeats chip 0
    and does not count.
    """
    rounds = -(-num_chips // world_size)
    dealt = (turn * world_size + rank for turn in range(rounds))
    return [(chip, True) if chip < num_chips else (0, False) for chip in dealt]
