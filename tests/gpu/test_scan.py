"""The kernel of mamba_ssm computes what our scan does."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.heads.pan_mamba.scan import chunked_scan, import_mamba, selective_scan

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 37), (2, 2500), (1, 24336)])
def test_mamba_ssm_equals_ours(
    batch: int, tokens: int, device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    if device.type != "cuda":
        pytest.skip("the kernel of mamba_ssm needs CUDA")
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.skip("mamba_ssm is not installed")
    import_mamba()  # With its own error, where selective_scan would take ours.
    inputs = arguments(batch, tokens, device)
    ours, theirs = chunked_scan(*inputs), selective_scan(*inputs)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad(y, inputs, weight) for y in (theirs, ours)]
    errors = [distance(theirs, ours), *(distance(a, b) for a, b in zip(*gradients, strict=True))]
    record_property("error", max(errors))
    assert max(errors) <= 1e-4


def arguments(batch: int, tokens: int, device: torch.device, channels: int = 64, states: int = 16) -> list[Tensor]:
    """Return x, delta, A, B, C and D as Pan-Mamba has them."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    values = (
        normal(batch, tokens, channels),
        F.softplus(normal(batch, tokens, channels) - 2),
        -torch.arange(1.0, states + 1).repeat(channels, 1),
        normal(batch, tokens, states),
        normal(batch, tokens, states),
        normal(channels),
    )
    return [value.to(device).requires_grad_() for value in values]


def distance(a: Tensor, b: Tensor) -> float:
    """Return max|a - b| / max|b|."""
    return ((a - b).abs().max() / b.abs().max()).item()
