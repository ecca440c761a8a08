"""Every network and every loss compiles as one graph, and the compiled ones compute the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig
from models.registry import ABSENT, all_pairs, build_model
from models.satfusion import Fusion, SatFusion
from pipeline.quality.losses import PLACEMENTS, LossConfig, Placement, fusion_loss
from pipeline.quality.registration import MODES, Mode

QUICK = [("srcnn", "pnn"), ("trnet_pan", ABSENT), (ABSENT, "u2net")]
PAIRS = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in all_pairs()]

Parts = Sequence[Tensor | None]


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Parts], backend: str) -> Callable[..., Parts]:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)  # type: ignore[no-any-return]


def network(encoder: str, head: str, *, published: bool = False) -> SatFusion:
    torch.manual_seed(0)
    model = build_model(ModelConfig(encoder, head, revisits=3, hidden=8, published=published)).train()
    model.at_step(model.config.kernel_freeze_step)
    return model


def inputs(model: SatFusion, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    lr, pan = (8, 8), (12, 16)
    if model.config.published:  # sizes that some models require
        lr, pan = ((50, 50) if "trnet" in model.config.encoder else lr), ((156, 156))
    return torch.rand(2, 3, 3, *lr, dtype=dtype), torch.rand(2, 1, *pan, dtype=dtype), torch.tensor([1, 2])


def forward_backward(function: Callable[..., Parts], arguments: Sequence[object], leaves: Sequence[Tensor]) -> Tensor:
    """Return all results and all gradients in one row."""
    results = [result for result in function(*arguments) if result is not None]
    total = torch.stack([result.float().square().mean() for result in results if result.requires_grad]).sum()
    gradients = [g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None]
    return torch.cat([value.detach().double().flatten() for value in (*results, *gradients)])


def assert_same(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("encoder", "head"), PAIRS)
def test_a_network_is_one_graph(encoder: str, head: str) -> None:
    # In float64, where rounding does not change the sign at a ReLU.
    model = network(encoder, head).double()
    arguments, leaves = inputs(model, torch.float64), list(model.parameters())
    expected = forward_backward(model, arguments, leaves)
    assert_same(forward_backward(compiled(model, "aot_eager"), arguments, leaves), expected, 1e-6)


@pytest.mark.parametrize(("encoder", "head"), PAIRS)
def test_a_network_is_one_graph_in_bfloat16(encoder: str, head: str) -> None:
    model = network(encoder, head)
    with torch.autocast("cpu", torch.bfloat16):
        fused = compiled(model, "eager")(*inputs(model))[0]
        expected = model(*inputs(model)).fused
    assert fused is not None
    fused.float().square().mean().backward()
    assert fused.dtype == expected.dtype


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "head"), all_pairs())
def test_a_published_network_is_one_graph(encoder: str, head: str) -> None:
    model = network(encoder, head, published=True)
    fused = compiled(model, "eager")(*inputs(model))[0]
    assert fused is not None
    fused.square().mean().backward()


@pytest.mark.parametrize(
    ("registration", "placement"),
    [
        pytest.param(*modes, marks=() if modes == ("centred", "fused") else pytest.mark.slow)
        for modes in itertools.product(MODES, PLACEMENTS)
    ],
)
@pytest.mark.parametrize("adjust", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_loss_is_one_graph(registration: Mode, placement: Placement, adjust: bool) -> None:
    config = LossConfig(registration=registration, placement=placement, bias_adjust=adjust)
    arguments = stages(), torch.rand(2, 3, 16, 20), config
    leaves = [image for image in arguments[0][: 3 if placement == "staged" else 1] if image is not None]
    expected = forward_backward(fusion_loss, arguments, leaves)
    assert_same(forward_backward(compiled(fusion_loss, "aot_eager"), arguments, leaves), expected, 1e-5)


def test_a_loss_with_all_terms_is_one_graph() -> None:
    config, images = LossConfig(angle=0.1, consistency=1.0), stages()
    arguments = images, torch.rand(2, 3, 16, 20), config, None, torch.rand(2, 3, 3, 12, 13)
    expected = forward_backward(fusion_loss, arguments, [images.fused])
    assert_same(forward_backward(compiled(fusion_loss, "aot_eager"), arguments, [images.fused]), expected, 1e-5)


def stages() -> Fusion:
    generator = torch.Generator().manual_seed(1)
    return Fusion(*(torch.rand(2, 3, 16, 20, generator=generator).requires_grad_() for _ in range(3)))


@pytest.mark.parametrize(
    ("encoder", "head"), [pytest.param("srcnn", "pnn", marks=pytest.mark.slow), (ABSENT, "pannet")]
)
def test_generated_code_computes_the_same_loss_and_gradients(encoder: str, head: str) -> None:
    # An encoder's image is shrunk here, from 16 to 12 rows: PyTorch 2.13 lost the gradient of that.
    model = network(encoder, head)
    lr, pan, revisit = inputs(model)
    target = torch.rand(2, 3, *pan.shape[-2:])
    leaves = list(model.parameters())

    def step(lr: Tensor, pan: Tensor, revisit: Tensor) -> Parts:
        return fusion_loss(model(lr, pan, revisit), target, LossConfig())

    expected = forward_backward(step, (lr, pan, revisit), leaves)
    assert_same(forward_backward(compiled(step, "inductor"), (lr, pan, revisit), leaves), expected, 1e-5)
