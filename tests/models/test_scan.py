"""The selective scan: equal to one step at a time, in bounded memory, at any length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.heads.pan_mamba import scan
from models.heads.pan_mamba.scan import BACKWARD_FLOPS, FORWARD_FLOPS, Plan, selective_scan


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


class FusedKernels(ModuleType):
    """Stand-in for the extension of mamba_ssm, by the scan of this repository: u [B, c, n], B and C [B, 1, k, n]."""

    def __init__(self) -> None:
        super().__init__("selective_scan_cuda")
        self.calls: list[str] = []

    def _given(self, call: str, *tensors: Tensor) -> list[Tensor]:
        self.calls.append(call)
        assert {value.dtype for value in tensors} == {torch.float32}
        assert all(value.stride(-1) == 1 or value.shape[-1] == 1 for value in tensors)
        return [value.squeeze(1).mT.contiguous() for value in tensors]

    def fwd(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: None, bias: None, softplus: bool
    ) -> list[Tensor]:
        assert (z, bias, softplus) == (None, None, False)
        x, steps, writes, reads = self._given("fwd", u, delta, B, C)
        states = u.new_full((*u.shape[:2], -(-u.shape[2] // scan.FUSED_CHUNK), 2 * A.shape[1]), 7.0)
        return [scan.chunked_scan(x, steps, A, writes, reads, D).mT.contiguous(), states]

    def bwd(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: None, bias: None, grad: Tensor,
        states: Tensor, out: None, grad_z: None, softplus: bool, recompute: bool,
    ) -> list[Tensor | None]:  # fmt: skip
        assert (z, bias, out, grad_z, softplus, recompute) == (None, None, None, None, False, False)
        assert (states == 7).all()
        x, steps, writes, reads, grad = self._given("bwd", u, delta, B, C, grad)
        kept = scan._scan(x, steps, A, writes, reads)[1]
        grad_x, grad_steps, grad_A, grad_B, grad_C = scan._scan_backward(grad, x, steps, A, writes, reads, kept)
        grad_B, grad_C = (value.mT.contiguous().unsqueeze(1) for value in (grad_B, grad_C))
        grad_x = (grad_x + D * grad).mT.contiguous()
        return [grad_x, grad_steps.mT.contiguous(), grad_A, grad_B, grad_C, (grad * x).sum((0, 1)), None]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[FusedKernels]:
    """Replace the extension by the stand-in, and CUDA by the CPU."""
    module = FusedKernels()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(scan, "FUSED_DEVICE", "cpu")
    scan._tried_mamba.cache_clear()
    yield module
    scan._tried_mamba.cache_clear()


def values_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    y = function(*inputs)
    weight = torch.rand(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, weight)]


@pytest.mark.parametrize("tokens", [5, 2049])
def test_the_fused_scan_gets_what_it_wants_and_gives_the_same(kernels: FusedKernels, tokens: int) -> None:
    inputs = arguments(2, tokens, dtype=torch.float32)
    for ours, expected in zip(
        values_and_gradients(selective_scan, inputs), values_and_gradients(scan.chunked_scan, inputs), strict=True
    ):
        torch.testing.assert_close(ours, expected)
    assert kernels.calls == ["fwd", "bwd"]


def test_the_fused_scan_is_one_operator_of_a_compiled_graph(kernels: FusedKernels) -> None:
    torch._dynamo.reset()
    inputs = arguments(2, 37, dtype=torch.float32)

    def twice(x: Tensor, *others: Tensor) -> Tensor:
        return selective_scan(selective_scan(x, *others), *others)

    compiled = torch.compile(twice, fullgraph=True, dynamic=False, backend="aot_eager")
    for ours, expected in zip(values_and_gradients(compiled, inputs), values_and_gradients(twice, inputs), strict=True):
        torch.testing.assert_close(ours, expected)
    assert kernels.calls == ["fwd", "fwd", "bwd", "bwd"] * 2


@pytest.mark.usefixtures("kernels")
def test_the_fused_operator_keeps_its_promises() -> None:
    x, delta, A, B, C, D = (value.detach() for value in arguments(2, 37, dtype=torch.float32))
    inputs = [value.mT.contiguous() if value.ndim == 3 else value for value in (x, delta, A, B, C, D)]
    torch.library.opcheck(scan._fused_scan, [value.requires_grad_() for value in inputs])


@pytest.mark.usefixtures("kernels")
def test_the_fused_scan_counts_the_same_work() -> None:
    with FlopCounterMode(display=False) as counter:
        values_and_gradients(selective_scan, arguments(2, 50, dtype=torch.float32))
    assert counter.get_total_flops() == (FORWARD_FLOPS + BACKWARD_FLOPS) * 2 * 50 * 3 * 2


def test_the_fused_scan_is_taken_on_cuda_in_float32(kernels: FusedKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "FUSED_DEVICE", "cuda")
    types = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    taken = {(d, t) for d in ("cpu", "cuda") for t in types if scan._is_fused(d, torch.promote_types(t, torch.float32))}
    assert taken == {("cuda", t) for t in types[:3]}


def test_a_type_that_is_widened_comes_back(kernels: FusedKernels) -> None:
    y = selective_scan(*(value.detach().bfloat16() for value in arguments(2, 5)))
    assert (y.shape, y.dtype, kernels.calls) == ((2, 5, 3), torch.bfloat16, ["fwd"])


def test_without_mamba_ssm_cuda_takes_the_same_scan_as_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    scan._tried_mamba.cache_clear()
    assert not scan._is_fused("cuda", torch.float32)
    scan._tried_mamba.cache_clear()
