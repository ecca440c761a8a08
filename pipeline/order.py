"""Order of chips: the chips of each global batch and the part of each rank, as pure functions on integers.

A chip is ``chips of a scene * sample + window`` with samples numbered in the index's order. The sequence depends on the
index digest, the seed, the epoch, the global batch and the shuffle settings alone, never on ranks, workers or restarts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sharding.errors import UserError

CHIPS_PER_SCENE = 9
"""Chips of a scene of WorldStrat."""

Chips = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """Split of a global batch over ranks and micro-batches; no other code combines these four numbers."""

    global_batch: int
    """Chips per optimizer step over all ranks."""
    micro_batch: int
    """Chips per forward pass of one rank."""
    world_size: int
    """Number of ranks."""

    @classmethod
    def create(cls, global_batch: int, micro_batch: int, world_size: int) -> BatchPlan:
        """Derive the plan: the largest micro-batch up to ``micro_batch`` that divides a rank's part, or all of it if 0.

        So the same configuration fits every world whose size divides the global batch.

        Raises:
            UserError: ``global_batch`` is not a multiple of ``world_size``.
        """
        per_rank, rest = divmod(global_batch, world_size)
        if rest:
            sizes = [size for size in range(1, global_batch + 1) if global_batch % size == 0]
            raise UserError(
                f"train.global_batch = {global_batch} is not divisible by {world_size} ranks: set train.global_batch to"
                f" a multiple of {world_size}, or train with {_either(sizes, world_size)} ranks"
            )
        largest = min(micro_batch or per_rank, per_rank)
        micro = max(size for size in range(1, largest + 1) if per_rank % size == 0)
        return cls(global_batch, micro, world_size)

    @property
    def per_rank(self) -> int:
        """Return the chips of one rank per optimizer step."""
        return self.global_batch // self.world_size

    @property
    def grad_accum(self) -> int:
        """Return the forward passes of one rank per optimizer step."""
        return self.per_rank // self.micro_batch


def _either(sizes: Sequence[int], wanted: int) -> str:
    """Return the nearest of ascending sizes below and above a wanted one, in words."""
    near = [max(size for size in sizes if size < wanted), *[size for size in sizes if size > wanted][:1]]
    return " or ".join(map(str, near))


def random_words(count: int, *key: int | str) -> npt.NDArray[np.uint64]:
    """Return ``count`` uniform 64-bit words that depend on ``key`` alone (Philox; numpy keeps its stream stable)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    words = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=words).random_raw(count)


def permutation(count: int, *key: int | str) -> Chips:
    """Return a permutation of ``range(count)`` that depends on ``key`` alone."""
    return np.argsort(random_words(count, *key), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Shuffle:
    """Limits of the shuffle, which decide the order; a run keeps them."""

    window: int = 4
    """Shards whose chips are shuffled together, >= 1."""
    lanes: int = 8
    """Upper bound of the contiguous stretches of an epoch that a global batch is taken from, >= 1."""


@dataclass(frozen=True)
class OrderState:
    """Everything that the order of a run's chips depends on; only a run with an equal state can resume."""

    index_digest: str
    """Digest of the dataset's index."""
    split: str
    """Split that is trained on."""
    seed: int
    """Seed of order and augmentation."""
    global_batch: int
    """Chips per optimizer step over all ranks."""
    shuffle_window: int
    """Window of the `Shuffle`."""
    lanes: int
    """Lanes of the `Shuffle`."""
    cloudy: str = "keep"
    """Rule by which the revisits of a chip are chosen, ``data.cloudy``."""

    def differences(self, now: OrderState) -> dict[str, tuple[object, object]]:
        """Return each field that differs, with its value here and in ``now``."""
        before, after = vars(self), vars(now)
        return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


class Stretch(NamedTuple):
    """The chips of one shard in one pass of an epoch over it."""

    first: int
    """First chip of the shard in this pass. Chips of the second pass are numbered after all of the first, and so on."""
    chips: int
    """Chips of the shard."""
    taken: int
    """Number of them that an epoch takes: all, but of the last pass if the passes are no whole number."""


def stretches(samples_per_shard: Sequence[int], chips_per_scene: int, passes: Sequence[float] = ()) -> list[Stretch]:
    """Return the stretches of each epoch, by shard and pass.

    Args:
        samples_per_shard: Scenes in each shard, in index order.
        chips_per_scene: Chips of each scene.
        passes: Passes of an epoch over each shard, > 0; none for one pass over all.
    """
    sizes = [count * chips_per_scene for count in samples_per_shard]
    total, first, found = sum(sizes), 0, list[Stretch]()
    parts = 0.0  # chips of broken passes so far: shards get them rounded, so that their sum is right
    for shard, size in enumerate(sizes):
        whole, part = divmod(passes[shard] if passes else 1, 1)
        found += [Stretch(first + number * total, size, size) for number in range(int(whole))]
        if part:
            taken = math.floor(parts + part * size + 1e-6) - math.floor(parts + 1e-6)
            parts += part * size
            found.append(Stretch(first + int(whole) * total, size, taken))
        first += size
    return found


def epoch_chips(
    samples_per_shard: Sequence[int],
    digest: str,
    seed: int,
    epoch: int,
    window: int,
    chips_per_scene: int = CHIPS_PER_SCENE,
    passes: Sequence[float] = (),
) -> Chips:
    """Return the order of all chips of one epoch.

    Shards are permuted, then the chips of each run of ``window`` shards are shuffled together, so that a scene is read
    from a bounded stretch of the epoch.

    Args:
        samples_per_shard: Scenes in each shard of the split, in index order.
        digest: Digest of the index.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        window: Shards shuffled together.
        chips_per_scene: Chips of each scene, a fact of the dataset.
        passes: Passes over each shard, see `stretches`; a broken one takes other chips in each epoch.

    Returns:
        [chips_per_scene * scenes] chip numbers, each once, if there is one pass over all shards.
    """
    whole = stretches(samples_per_shard, chips_per_scene, passes)
    shards = permutation(len(whole), digest, seed, epoch, "shards")
    parts: list[Chips] = []
    for first in range(0, len(shards), window):
        chips = np.concatenate([_taken(whole[s], digest, seed, epoch) for s in shards[first : first + window]])
        parts.append(chips[permutation(len(chips), digest, seed, epoch, "chips", first)])
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _taken(stretch: Stretch, digest: str, seed: int, epoch: int) -> Chips:
    """Return the chips that an epoch takes of a stretch, ascending."""
    if stretch.taken == stretch.chips:
        return np.arange(stretch.first, stretch.first + stretch.chips, dtype=np.int64)
    chosen = permutation(stretch.chips, digest, seed, epoch, "part", stretch.first)[: stretch.taken]
    return stretch.first + np.sort(chosen)


def epoch_batches(
    samples_per_shard: Sequence[int],
    digest: str,
    seed: int,
    epoch: int,
    global_batch: int,
    shuffle: Shuffle,
    chips_per_scene: int = CHIPS_PER_SCENE,
    passes: Sequence[float] = (),
) -> Chips:
    """Return the global batches of one epoch; they do not depend on ranks, workers and restarts.

    The epoch's chips (`epoch_chips`) are cut into lanes, each a contiguous stretch: their number is the largest divisor
    of the global batch that is not above ``shuffle.lanes``. Batch k takes the k-th slice of every lane, lane after
    lane. So the consecutive slots of a rank lie in few lanes: ranks read different shards, except at the edges of
    lanes. And a batch holds chips of far more shards than one window.

    Returns:
        [steps, global_batch] chip numbers, none twice; the tail that does not fill a batch is dropped.
    """
    chips = epoch_chips(samples_per_shard, digest, seed, epoch, shuffle.window, chips_per_scene, passes)
    steps = steps_per_epoch(len(chips), global_batch)
    lanes = max(count for count in range(1, min(shuffle.lanes, global_batch) + 1) if global_batch % count == 0)
    lane_slices = chips[: steps * global_batch].reshape(lanes, steps, global_batch // lanes)
    return np.ascontiguousarray(lane_slices.transpose(1, 0, 2)).reshape(steps, global_batch)


def steps_per_epoch(num_chips: int, global_batch: int) -> int:
    """Return the whole global batches per epoch; the tail of ``num_chips % global_batch`` chips is dropped."""
    return num_chips // global_batch


def rank_slots(batches: Chips, plan: BatchPlan, rank: int) -> Chips:
    """Return the consecutive slots [..., per_rank] that ``rank`` takes of global batches [..., global_batch]."""
    return batches[..., rank * plan.per_rank : (rank + 1) * plan.per_rank]


def evaluation_slots(num_chips: int, rank: int, world_size: int) -> list[tuple[int, bool]]:
    """Return the chips that ``rank`` evaluates as (chip, counts): a stretch of the split, so few ranks read a scene.

    Every rank gets the same number, because ZeRO 3 gathers weights in each forward pass; a filler repeats chip 0
    and does not count.
    """
    each = -(-num_chips // world_size)
    return [(chip, True) if chip < num_chips else (0, False) for chip in range(rank * each, (rank + 1) * each)]
