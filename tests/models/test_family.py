"""Contracts of every model of the family: the 41 at one size in the fast tests, at all sizes in the slow grid."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from models.config import ModelConfig
from models.registry import ENCODERS, HEADS, all_pairs, build_model
from models.satfusion import SatFusion

# LR and PAN sizes that few numbers divide, and one that many divide.
SIZES = {"odd": ((9, 11), (31, 26)), "even": ((8, 8), (24, 24))}


def keeps_its_promises(config: ModelConfig, lr_size: tuple[int, int], pan_size: tuple[int, int]) -> None:
    """Check shape, gradients, determinism in evaluation and the round trip through a state dict."""
    torch.manual_seed(0)
    model = build_model(config)
    lr, pan = torch.rand(2, config.revisits, config.bands, *lr_size), torch.rand(2, 1, *pan_size)
    fused = model.train()(lr, pan).fused
    assert fused.shape == (2, config.bands, *pan_size)
    fused.square().mean().backward()
    idle = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            idle.add(name)
        else:
            assert parameter.grad.isfinite().all(), name
    # A step uses one of ARConv's nine kernel sizes.
    assert all(".convs." in name for name in idle), idle
    assert len(idle) == 10 * 8 * 2 * (config.head == "arconv")
    first = evaluated(model, lr, pan)
    assert torch.equal(first, evaluated(model, lr, pan))
    other = build_model(config)
    for parameter in other.parameters():
        parameter.data += 0.1  # a stage may begin with the same weights each time
    assert not torch.equal(first, evaluated(other, lr, pan))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(first, evaluated(other, lr, pan))


@torch.no_grad()
def evaluated(model: SatFusion, lr: torch.Tensor, pan: torch.Tensor) -> torch.Tensor:
    return model.eval()(lr, pan).fused


def test_every_encoder_with_every_head_and_each_alone_is_a_model() -> None:
    assert len(all_pairs()) == len(set(all_pairs())) == (len(ENCODERS) + 1) * (len(HEADS) + 1) - 1


@pytest.mark.parametrize(("encoder", "head"), all_pairs())
def test_every_model(encoder: str, head: str) -> None:
    keeps_its_promises(ModelConfig(encoder, head, bands=2, revisits=3, hidden=8), *SIZES["odd"])


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "head"), all_pairs())
def test_every_model_at_every_size(encoder: str, head: str) -> None:
    for size, bands, revisits in itertools.product(SIZES.values(), (3, 4), (1, 5, 8)):
        keeps_its_promises(ModelConfig(encoder, head, bands=bands, revisits=revisits, hidden=8), *size)
