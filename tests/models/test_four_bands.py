"""Every model takes 4 bands at a ratio of 4, and other geometries of other sensors."""

from __future__ import annotations

import pytest
import torch

from models.config import ModelConfig
from models.registry import all_pairs, build_model
from pipeline.evaluation.catalogue import takes_four_bands


@pytest.mark.parametrize(("encoder", "head"), all_pairs())
def test_every_model_takes_four_bands_at_a_ratio_of_four(encoder: str, head: str) -> None:
    config = ModelConfig(encoder, head, bands=4, revisits=3, hidden=16)
    assert takes_four_bands(config) == "yes"
    torch.manual_seed(0)
    network = build_model(config).eval()
    with torch.no_grad():
        fused = network(torch.rand(1, 3, 4, 8, 8), torch.rand(1, 1, 32, 32)).fused
    assert fused.shape == (1, 4, 32, 32)
    assert torch.isfinite(fused).all()


@pytest.mark.parametrize(("bands", "lr", "pan"), [(1, 9, 18), (8, 8, 32), (13, 6, 40)])
def test_other_sensors_fit_too(bands: int, lr: int, pan: int) -> None:
    for encoder, head in (("trnet_pan", "u2net"), ("rams", "innformer")):
        network = build_model(ModelConfig(encoder, head, bands=bands, revisits=3, hidden=16)).eval()
        with torch.no_grad():
            fused = network(torch.rand(1, 3, bands, lr, lr), torch.rand(1, 1, pan, pan)).fused
        assert fused.shape == (1, bands, pan, pan)


def test_a_model_that_cannot_says_why() -> None:
    assert "bands" in takes_four_bands(ModelConfig("rams", "none", published=True))
