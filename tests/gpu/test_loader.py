"""Batches that are copied to the GPU from pinned memory, beside its computing, are the CPU's bit for bit."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import DataConfig
from pipeline.data import ChipDataset, TrainLoader
from pipeline.order import BatchPlan

pytestmark = pytest.mark.gpu

EPOCHS = 2


@pytest.mark.parametrize("windows", [False, True], ids=["fixed", "random"])
def test_batches_are_those_of_the_cpu(windows: bool, device: torch.device, data_uri: str) -> None:
    dataset = ChipDataset(data_uri, "train", DataConfig(random_windows=windows, prefetch_batches=3))
    plan = BatchPlan.create(4, 0, 1)
    loader = TrainLoader(dataset, plan, 0, seed=5, device=device)
    work = torch.rand(2048 if device.type == "cuda" else 64, device=device).diag()
    kept = []
    for epoch in range(EPOCHS):
        for batch in loader.batches(epoch):
            # The GPU is behind the loop: buffers are used again while it still computes.
            for _ in range(8):
                work = torch.tanh(work @ work)
            kept.append((batch.chips, [tensor.clone() for tensor in batch.tensors]))
    on_cpu = TrainLoader(dataset, plan, 0, seed=5)
    expected = [batch for epoch in range(EPOCHS) for batch in on_cpu.batches(epoch)]
    assert len(kept) == len(expected) == EPOCHS * loader.steps_per_epoch
    for (chips, tensors), batch in zip(kept, expected, strict=True):
        assert chips == batch.chips
        for ours, theirs in zip(tensors, batch.tensors, strict=True):
            assert ours.device.type == device.type
            assert torch.equal(ours.cpu(), theirs)
    if device.type == "cuda":
        assert all(stored.memory.is_pinned() for stored in loader._memory.queue)
