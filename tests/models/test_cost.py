"""Costs from shapes alone equal those of arithmetic, and those of a forward pass on real tensors."""

from __future__ import annotations

import torch

from models.config import ModelConfig
from models.cost import cost
from models.registry import build_model

PIXELS = 24 * 20


def test_a_network_of_convolutions() -> None:
    found = cost(ModelConfig("none", "pnn"), (8, 8), (24, 20))
    assert found.parameters == 74_435
    weights = 81 * 4 * 64 + 25 * 64 * 32 + 25 * 32 * 3
    assert found.flops == 2 * weights * PIXELS
    # The input and the two results of ReLU.
    assert found.activation_bytes == 4 * (4 + 64 + 32) * PIXELS


def test_attention_is_counted_without_its_weights_being_kept() -> None:
    small, large = (cost(ModelConfig("none", "u2net"), (8, 8), (size, size)) for size in (32, 64))
    attention = [4 * 16 * sum(heads * (size // shrunk) ** 4 for heads, shrunk in LEVELS) for size in (32, 64)]
    # Except for the attention all costs grow with the pixels, also the 16 x 16 spectral attention.
    assert large.flops - attention[1] == 4 * (small.flops - attention[0])
    assert large.activation_bytes < 4.01 * small.activation_bytes


LEVELS = ((2, 1), (4, 2), (8, 4), (4, 2), (2, 1))
"""Heads of 16 channels, and the factor by which the grid is smaller."""


def test_the_scan_keeps_no_states() -> None:
    small, large = (cost(ModelConfig("none", "pan_mamba"), (8, 8), (size, size)) for size in (32, 64))
    assert large.activation_bytes < 4.1 * small.activation_bytes
    assert large.flops > 30 * 7 * 64 * 16 * 64**2


def test_what_is_kept_is_what_a_real_pass_keeps() -> None:
    config = ModelConfig("trnet_pan", "arconv", hidden=8, revisits=3)
    torch.manual_seed(0)
    model = build_model(config).eval()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in own:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.rand(1, 3, 3, 9, 9), torch.rand(1, 1, 28, 28))
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert cost(config, (9, 9), (28, 28)).activation_bytes == real
