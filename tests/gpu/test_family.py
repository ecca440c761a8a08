"""All 41 models, forward and backward, under bfloat16 autocast."""

from __future__ import annotations

import pytest
import torch

from models.config import ModelConfig
from models.registry import all_pairs, build_model

pytestmark = pytest.mark.gpu

SIZES = {"cuda": (128, 50, 156), "cpu": (8, 9, 28)}
"""Width, side of LR and side of PAN: those of a training on a GPU, the least elsewhere."""


@pytest.mark.parametrize(("encoder", "head"), all_pairs())
def test_bfloat16(encoder: str, head: str, device: torch.device) -> None:
    torch.manual_seed(0)
    hidden, low, high = SIZES[device.type]
    config = ModelConfig(encoder, head, hidden=hidden)
    model = build_model(config).to(device).train()
    lr = torch.rand(2, config.revisits, config.bands, low, low, device=device)
    pan = torch.rand(2, 1, high, high, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        fused = model(lr, pan).fused
    assert fused.isfinite().all()
    fused.float().square().mean().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert gradients
    assert not [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
