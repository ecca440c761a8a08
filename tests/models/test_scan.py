"""The selective scan: equal to one step at a time, in bounded memory, at any length."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models.heads.pan_mamba import scan
from models.heads.pan_mamba.scan import FORWARD_FLOPS, Plan, selective_scan


def step_by_step(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0, :, None] * A)
    outputs = []
    for t in range(x.shape[1]):
        u = delta[:, t] * x[:, t]
        state = torch.exp(delta[:, t, :, None] * A) * state + u.unsqueeze(-1) * B[:, t].unsqueeze(1)
        outputs.append((state * C[:, t].unsqueeze(1)).sum(-1) + D * x[:, t])
    return torch.stack(outputs, dim=1)


def arguments(
    batch: int, tokens: int, channels: int = 3, states: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = (
        normal(batch, tokens, channels),
        F.softplus(normal(batch, tokens, channels) - 2),
        -normal(channels, states).exp(),
        normal(batch, tokens, states),
        normal(batch, tokens, states),
        normal(channels),
    )
    return [value.to(dtype).requires_grad_() for value in values]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 2), (3, 37), (1, 331), (2, 600)])
def test_values_and_gradients_are_those_of_one_step_at_a_time(batch: int, tokens: int) -> None:
    inputs = arguments(batch, tokens)
    ours, expected = selective_scan(*inputs), step_by_step(*inputs)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(expected)
    for gradient, reference in zip(
        torch.autograd.grad(ours, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(gradient, reference)


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(selective_scan, arguments(2, 11))


@pytest.mark.parametrize(
    ("batch", "tokens", "state"), [(1, 1, 1024), (1, 24336, 1024), (8, 331, 1024), (3, 600, 10**6)]
)
def test_a_plan_covers_every_token_once(batch: int, tokens: int, state: int) -> None:
    plan = Plan.of(batch, tokens, state)
    x = torch.arange(1.0, 1 + batch * tokens).view(batch, tokens, 1)
    cut = plan.cut(x)
    assert cut.shape == (plan.blocks, plan.steps, batch * plan.chunks, 1)
    assert cut.sum(dtype=torch.float64) == x.sum(dtype=torch.float64)
    assert torch.equal(plan.join(cut), x)
    assert max(plan.blocks, plan.steps) ** 2 <= 4 * tokens / plan.chunks


@pytest.mark.parametrize("step", [0.0, 1e-30, 300.0])
def test_no_step_size_overflows(step: float) -> None:
    x, _, A, B, C, D = arguments(1, 100, dtype=torch.float32)
    delta = torch.full_like(x, step, requires_grad=True)
    inputs = [x, delta, A, B, C, D]
    y = selective_scan(*inputs)
    torch.testing.assert_close(y, step_by_step(*inputs))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), inputs))


def test_half_precision_is_computed_in_float32() -> None:
    halves = [value.detach().bfloat16() for value in arguments(2, 37)]
    expected = step_by_step(*(value.float() for value in halves))
    ours = selective_scan(*halves)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected.bfloat16().float())


def test_autocast_changes_nothing() -> None:
    inputs = arguments(2, 37, dtype=torch.float32)
    y = selective_scan(*inputs)
    gradients = torch.autograd.grad(y.sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        again = selective_scan(*inputs)
        same = torch.autograd.grad(again.sum(), inputs)
    assert torch.equal(y, again)
    assert all(map(torch.equal, gradients, same))


def test_what_is_kept_for_the_backward_pass_is_far_less_than_all_states() -> None:
    inputs = arguments(1, 8000, channels=64, states=16, dtype=torch.float32)
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        selective_scan(*inputs)
    mandatory = sum(value.nbytes for value in inputs)
    assert sum(kept.values()) - mandatory < 8000 * 64 * 16 * 4 / 8


def test_the_operator_keeps_its_promises() -> None:
    torch.library.opcheck(scan._scan, arguments(2, 37)[:5])


def test_shapes_and_work_are_known_without_computing() -> None:
    inputs = [value.detach().to("meta").requires_grad_() for value in arguments(2, 50)]
    with FlopCounterMode(display=False) as forward:
        y = selective_scan(*inputs)
    with FlopCounterMode(display=False) as backward:
        gradients = torch.autograd.grad(y.sum(), inputs)
    assert y.shape == (2, 50, 3)
    assert [gradient.shape for gradient in gradients] == [value.shape for value in inputs]
    assert forward.get_total_flops() == FORWARD_FLOPS * 2 * 50 * 3 * 2
    assert backward.get_total_flops() > forward.get_total_flops()


def test_the_fused_scan_gets_sequences_with_the_channels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = arguments(2, 5, dtype=torch.float32)
    expected = selective_scan(*inputs)
    monkeypatch.setattr(scan, "_fused_scan", lambda *_: fused_step_by_step)
    torch.testing.assert_close(selective_scan(*inputs), expected)


def fused_step_by_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_softplus: bool = False
) -> Tensor:
    """As ``selective_scan_fn`` of mamba_ssm: u and delta [B, c, n], B and C [B, k, n]."""
    assert not delta_softplus
    return step_by_step(u.mT, delta.mT, A, B.mT, C.mT, D).mT


def test_the_fused_scan_is_taken_on_cuda_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def selective_scan_fn(u: Tensor, *others: Tensor) -> Tensor:
        calls.append((u.shape, {value.dtype for value in (u, *others)}))
        return torch.empty_like(u)

    module = ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    scan._import_fused.cache_clear()
    with FakeTensorMode():
        for device, dtype in itertools.product(("cpu", "cuda"), (torch.bfloat16, torch.float32, torch.float64)):
            inputs = [torch.empty(value.shape, device=device, dtype=dtype) for value in arguments(2, 5)]
            y = selective_scan(*inputs)
            assert (y.shape, y.dtype, y.device.type) == ((2, 5, 3), dtype, device)
    scan._import_fused.cache_clear()
    assert calls == [((2, 3, 5), {torch.float32})] * 2


def test_without_mamba_ssm_cuda_takes_the_same_scan_as_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    scan._import_fused.cache_clear()
    assert scan._fused_scan("cuda", torch.float32) is None
    scan._import_fused.cache_clear()
