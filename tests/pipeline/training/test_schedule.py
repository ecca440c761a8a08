"""Learning rates against PyTorch's own schedulers."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import TrainConfig
from pipeline.training.schedule import learning_rate


def test_warm_restarts_are_pytorchs_stepped_once_an_epoch() -> None:
    config = TrainConfig(learning_rate=1e-3, restart_epochs=4, min_learning_rate=1e-5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=4, eta_min=1e-5)
    for epoch in range(10):
        for step in range(1, 4):
            ours = learning_rate(epoch * 3 + step, 3, 30, config)
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_warmup_cosine_rises_then_falls_to_its_floor() -> None:
    config = TrainConfig(learning_rate=1.0, schedule="warmup_cosine", warmup_steps=10, min_learning_rate=0.1)
    rates = [learning_rate(step, 5, 100, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[9] == max(rates)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
