"""Cost of lanes and shuffle windows in reads and memory, and their quality as a shuffle.

``python -m benchmarks.order``: numbers alone, no data. Reads are distinct shards and scenes of an epoch, summed over
the ranks; a rank that holds as many scenes as the table says reads none twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.order import CHIPS_PER_SCENE, BatchPlan, Chips, Shuffle, epoch_batches, rank_slots

RANKS = (1, 2, 4, 8)
LABELS = 64
"""Number of random labels that are averaged over."""


@dataclass(frozen=True)
class Dataset:
    """The shape of a training split."""

    shards: int
    scenes: int
    """Samples of each shard."""

    @property
    def chips(self) -> int:
        """Return the chips of an epoch."""
        return self.shards * self.scenes * CHIPS_PER_SCENE


@dataclass(frozen=True)
class Order:
    """Some epochs of one way to shuffle."""

    name: str
    epochs: list[Chips]
    """[steps, global batch] chips of each epoch."""


def orders(dataset: Dataset, batch: int, epochs: int) -> Iterator[Order]:
    """Yield our orders by lanes and windows, then a full shuffle."""
    layout = [dataset.scenes] * dataset.shards
    for lanes in (1, 8, 32):
        for window in (1, 4, 16):
            shuffle = Shuffle(window, lanes)
            made = [epoch_batches(layout, "digest", 1, epoch, batch, shuffle) for epoch in range(epochs)]
            yield Order(f"{lanes} | {window}", made)
    steps = dataset.chips // batch
    generator = np.random.default_rng(1)
    full = [generator.permutation(dataset.chips)[: steps * batch].reshape(steps, batch) for _ in range(epochs)]
    yield Order("full | shuffle", full)


def reads(batches: Chips, ranks: int, chips: int) -> int:
    """Return the number of distinct runs of ``chips`` chips (scenes, shards) that the ranks read, in all."""
    plan = BatchPlan.create(batches.shape[1], 0, ranks)
    return sum(len(np.unique(rank_slots(batches, plan, rank) // chips)) for rank in range(ranks))


def held(batches: Chips, ranks: int) -> int:
    """Return the most scenes that any rank has begun and not finished."""
    plan = BatchPlan.create(batches.shape[1], 0, ranks)
    most = 0
    for rank in range(ranks):
        scenes = rank_slots(batches, plan, rank) // CHIPS_PER_SCENE
        _, first = np.unique(scenes, return_index=True)
        _, last = np.unique(scenes[::-1], return_index=True)
        change = np.zeros(len(scenes) + 1, np.int64)
        np.add.at(change, first // scenes.shape[1], 1)
        np.add.at(change, len(scenes) - last // scenes.shape[1], -1)
        most = max(most, int(change.cumsum().max()))
    return most


def sharing(batches: Chips) -> float:
    """Return the share of chips whose batch holds another chip of their scene."""
    scenes = np.sort(batches // CHIPS_PER_SCENE, axis=1)
    same = scenes[:, 1:] == scenes[:, :-1]
    edge = np.zeros((len(scenes), 1), dtype=bool)
    return float((np.hstack([edge, same]) | np.hstack([same, edge])).mean())


def shards_of_a_batch(batches: Chips, per_shard: int) -> float:
    """Return the mean number of shards in a batch."""
    shards = np.sort(batches // per_shard, axis=1)
    return float(1 + (shards[:, 1:] != shards[:, :-1]).sum(1).mean())


def spread(batches: Chips, chips: int) -> float:
    """Return the mean distance of two chips of one scene or shard, as a share of an epoch; 1/3 for a full mix."""
    step = np.full(batches.size + batches.shape[1], np.nan)
    step[batches.ravel()] = np.repeat(np.arange(len(batches)), batches.shape[1])
    groups = np.sort(step[: step.size // chips * chips].reshape(-1, chips), axis=1)
    groups = groups[~np.isnan(groups).any(1)]
    # The sum over all pairs of sorted numbers is one over the numbers, each weighted by the numbers below less those
    # above.
    weights = 2 * np.arange(chips) - chips + 1
    return float((groups @ weights).mean() / (chips * (chips - 1) / 2) / len(batches))


def correlation(batches: Chips) -> float:
    """Return the rank correlation of the places in storage and in the epoch."""
    return float(np.corrcoef(batches.ravel(), np.arange(batches.size))[0, 1])


def variance(batches: Chips, chips: int, chips_in_all: int, generator: np.random.Generator) -> float:
    """Return the variance of a batch's mean label, if all chips of a scene or shard have one random label."""
    labels: npt.NDArray[np.float64] = generator.standard_normal((LABELS, chips_in_all // chips))
    return float(np.mean([label[batches // chips].mean(1).var() for label in labels]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--scenes", type=int, default=19, help="of each shard")
    parser.add_argument("--batch", type=int, default=32, help="global batch, a multiple of 8")
    parser.add_argument("--epochs", type=int, default=5, help="epochs that the results are averaged over")
    options = parser.parse_args()
    dataset = Dataset(options.shards, options.scenes)
    per_shard = dataset.scenes * CHIPS_PER_SCENE
    every = list(orders(dataset, options.batch, options.epochs))

    def mean(values: Iterator[float]) -> float:
        return float(np.mean(list(values)))

    print("| Lanes | Window | shards read by 1/2/4/8 ranks | scenes read, of all | scenes held by a rank |")
    print("|---|---|---|---|---|")
    for order in every:
        shards = [f"{mean(reads(b, n, per_shard) for b in order.epochs):.0f}" for n in RANKS]
        total = dataset.shards * dataset.scenes
        scenes = [f"{mean(reads(b, n, CHIPS_PER_SCENE) for b in order.epochs) / total:.2f}" for n in RANKS]
        kept = [f"{mean(held(b, n) for b in order.epochs):.0f}" for n in RANKS]
        print(f"| {order.name} | {' / '.join(shards)} | {' / '.join(scenes)} | {' / '.join(kept)} |")

    print("\n| Lanes | Window | share a scene | shards | scene apart | shard apart | correlation | AOIs' | shards' |")
    print("|---|---|---|---|---|---|---|---|---|")

    def variances(order: Order, chips: int) -> float:
        generator = np.random.default_rng(2)
        return mean(variance(b, chips, dataset.chips, generator) for b in order.epochs)

    full = [variances(every[-1], chips) for chips in (CHIPS_PER_SCENE, per_shard)]
    for order in every:
        own = [variances(order, chips) for chips in (CHIPS_PER_SCENE, per_shard)]
        print(
            f"| {order.name} | {100 * mean(map(sharing, order.epochs)):.1f} %"
            f" | {mean(shards_of_a_batch(b, per_shard) for b in order.epochs):.1f}"
            f" | {mean(spread(b, CHIPS_PER_SCENE) for b in order.epochs):.3f}"
            f" | {mean(spread(b, per_shard) for b in order.epochs):.3f}"
            f" | {mean(abs(correlation(b)) for b in order.epochs):.3f}"
            f" | {' | '.join(f'{ours / theirs:.2f}x' for ours, theirs in zip(own, full, strict=True))} |"
        )


if __name__ == "__main__":
    main()
