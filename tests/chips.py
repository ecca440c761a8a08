"""Chips as training sees them, one at a time and without a loader: what the loader's batches are compared with."""

from __future__ import annotations

from pipeline.data import ChipDataset
from pipeline.data.batches import Batch, StoredBatch, to_batch
from pipeline.data.chips import training_draws
from pipeline.data.dataset import CPU


def training_chip(dataset: ChipDataset, chip: int, seed: int, epoch: int) -> Batch:
    """Return ``chip`` as training sees it in ``epoch``, as a batch of one."""
    stored = StoredBatch(dataset.layout, 1)
    dataset.crop([chip], [dataset.variant(chip, training_draws(dataset.num_chips, seed, epoch))], stored)
    return to_batch(stored, CPU, dataset.simulation, (seed, epoch))
