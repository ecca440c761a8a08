"""Selective scan: the recurrence of Mamba in PyTorch, with many chunks of the sequence at a time."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

STEP_NUMBERS = {"cpu": 1 << 15, "cuda": 1 << 20}
"""Size of a step of the recurrence, in numbers, if enough chunks exist: large enough that arithmetic and not calls take
the time, small enough for a core's cache. From 2^16 up PyTorch splits a step among threads, which is a little faster on
an idle machine and many times slower on a busy one, where a step then waits for the thread that is scheduled last."""

FORWARD_FLOPS = 7
"""Operations per state and token, forward: its decay (2), its input (1), the recurrence (2), its part of y (2)."""

BACKWARD_FLOPS = 20
"""Operations backward: the state again (5), the gradient of the state (3), of x, B, C, delta and A (2 each), of the
decay (2)."""

LOG2_E = 1 / math.log(2)

FUSED_DEVICE = "cuda"
"""Device type of mamba_ssm's scan."""

FUSED_CHUNK = 2048
"""Tokens between two of the states that it keeps for its backward pass."""


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Scan a sequence with input-dependent steps.

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752, equations 2a and
    2b with the discretisation of its section 3.2, B simplified to delta B as in the authors' code. With h_0 = 0,

        h_t[c, k] = exp(delta_t[c] A[c, k]) h_{t-1}[c, k] + delta_t[c] B_t[k] x_t[c]
        y_t[c] = sum_k C_t[k] h_t[c, k] + D[c] x_t[c]

    Computed in float32, or in float64 where ``x`` is. The backward pass computes the states again, so the memory kept
    between the passes has the size of the inputs. On CUDA the kernel of ``mamba_ssm`` runs if it is installed.

    Args:
        x: Sequence [batch, n, c].
        delta: Step sizes [batch, n, c], not negative.
        A: Rates [c, k], not positive.
        B: Input weights of the state [batch, n, k].
        C: Output weights of the state [batch, n, k].
        D: Weight of the skip connection [c].

    Returns:
        y [batch, n, c], of the type of ``x``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    u, delta, A, B, C, D = (value.to(wide) for value in (x, delta, A, B, C, D))
    if not _is_fused(x.device.type, wide):
        return chunked_scan(u, delta, A, B, C, D).to(x.dtype)
    u, delta, B, C = (value.mT.contiguous() for value in (u, delta, B, C))
    return cast(Tensor, _fused_scan(u, delta, A, B, C, D)[0]).mT.to(x.dtype)


def chunked_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Scan like :func:`selective_scan` without mamba_ssm; all tensors have one type, float32 or float64."""
    return cast(Tensor, _scan(x, delta, A, B, C)[0]) + D * x


def _is_fused(device: str, dtype: torch.dtype) -> bool:
    """Return whether mamba_ssm's scan is installed and can take these tensors."""
    return device == FUSED_DEVICE and dtype == torch.float32 and _has_mamba()


def _has_mamba() -> bool:
    return _tried_mamba()


# As torch.compiler.assume_constant_result marks a function; calling that imports the whole compiler, at every start.
_has_mamba._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _tried_mamba() -> bool:
    try:
        import_mamba()
    except ImportError:
        return False
    return True


def import_mamba() -> Any:
    """Import the kernels of mamba_ssm alone: the package imports language models and the libraries they need.

    Raises:
        ImportError: It is not installed, or not built for this Python and PyTorch.
    """
    return importlib.import_module("selective_scan_cuda")


@dataclass(frozen=True)
class Plan:
    """Plan of cutting a batch of sequences.

    Each sequence becomes ``chunks`` that are scanned in parallel twice: first without their initial state, to find what
    they add to it, then with it. A chunk is ``blocks`` of ``steps`` tokens. The states of one block are in memory at
    once, and one state before each block is kept: both grow with the square root of a chunk's length.
    """

    batch: int
    tokens: int
    chunks: int
    blocks: int
    steps: int

    @classmethod
    def of(cls, batch: int, tokens: int, state: int, device: str = "cpu") -> Plan:
        """Return the plan for sequences of ``tokens``, with ``state`` numbers in the state of each."""
        numbers = STEP_NUMBERS.get(device, STEP_NUMBERS["cpu"])
        # With more chunks than steps, the loop over the chunks' ends would be the longer one.
        chunks = max(1, min(numbers // (batch * state), math.isqrt(tokens)))
        length = -(-tokens // chunks)
        steps = math.isqrt(length - 1) + 1
        return cls(batch, tokens, chunks, -(-length // steps), steps)

    def cut(self, x: Tensor) -> Tensor:
        """Map [batch, n, c] to [blocks, steps, batch * chunks, c]; zeros at the end leave the state unchanged."""
        x = F.pad(x, (0, 0, 0, self.chunks * self.blocks * self.steps - self.tokens))
        x = x.reshape(self.batch, self.chunks, self.blocks, self.steps, -1)
        return x.permute(2, 3, 0, 1, 4).flatten(2, 3).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """Undo :meth:`cut`."""
        x = x.reshape(self.blocks, self.steps, self.batch, self.chunks, -1).permute(2, 3, 0, 1, 4)
        return x.flatten(1, 3)[:, : self.tokens].contiguous()

    def chain(self, ends: Tensor, gains: Tensor, reverse: bool = False) -> Tensor:
        """Return the state at the start of each chunk, [batch * chunks, k, c].

        Args:
            ends: Final state of each chunk for a zero initial state, [batch * chunks, k, c].
            gains: Share of the initial state in the final state, of the same shape.
            reverse: True goes from the last chunk to the first.
        """
        shape = (self.batch, self.chunks, *ends.shape[1:])
        ends, gains = ends.view(shape), gains.view(shape)
        entering = torch.zeros_like(ends)
        for before, here in itertools.pairwise(reversed(range(self.chunks)) if reverse else range(self.chunks)):
            torch.addcmul(ends[:, before], gains[:, before], entering[:, before], out=entering[:, here])
        return entering.flatten(0, 1)


@torch.library.custom_op("satfusion::selective_scan", mutates_args=())
def _scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return y without the skip connection, and the states before each block, [blocks, batch * chunks, k, c]."""
    plan = _plan(x, A)
    rates, inputs, writes, reads = (plan.cut(value) for value in (delta, delta * x, B, C))
    A = A.t().contiguous()
    decays = A.new_empty(*rates.shape[1:3], *A.shape)
    h = torch.empty_like(decays)
    state = torch.zeros_like(h[0])
    for block in range(plan.blocks):
        _decay(rates[block], A, decays)
        _outer(inputs[block], writes[block], h)
        state.copy_(_recur(decays, h, state))
    state = plan.chain(state, _gain(rates, A))
    states = A.new_empty(plan.blocks, *state.shape)
    y = torch.empty_like(inputs)
    for block in range(plan.blocks):
        states[block] = state
        _decay(rates[block], A, decays)
        _outer(inputs[block], writes[block], h)
        state.copy_(_recur(decays, h, state))
        _read(reads[block], h, y[block])
    return plan.join(y), states


@torch.library.custom_op("satfusion::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, delta, A, B and C from that of y.

    g_t = dL/dh_t = C_t dL/dy_t + exp(delta_{t+1} A) g_{t+1} is the same recurrence from the end to the beginning.
    """
    plan = _plan(x, A)
    rates, inputs, writes, reads, grads = (plan.cut(value) for value in (delta, delta * x, B, C, grad))
    A = A.t().contiguous()
    carry = _entering_gradients(plan, rates, grads, reads, A)
    decays = A.new_empty(*rates.shape[1:3], *A.shape)
    g = torch.empty_like(decays)
    h = A.new_empty(plan.steps + 1, *carry.shape)
    grad_inputs, grad_rates, grad_A = torch.empty_like(inputs), torch.empty_like(rates), torch.zeros_like(carry)
    grad_B, grad_C = torch.empty_like(writes), torch.empty_like(reads)
    for block in reversed(range(plan.blocks)):
        _decay(rates[block], A, decays)
        h[0] = states[block]
        _outer(inputs[block], writes[block], h[1:])
        _recur(decays, h[1:], h[0])
        _outer(grads[block], reads[block], g)
        carry = _recur_back(decays, g, carry)
        _read(writes[block], g, grad_inputs[block])
        _project(g, inputs[block], grad_B[block])
        _project(h[1:], grads[block], grad_C[block])
        exponent = decays.mul_(g).mul_(h[:-1])  # dL/d(delta_t A)
        for step, rate in zip(exponent, rates[block], strict=True):
            grad_A.addcmul_(step, rate.unsqueeze(1))
        torch.sum(torch.mul(exponent, A, out=g), 2, out=grad_rates[block])
    grad_inputs, grad_rates, grad_B, grad_C = map(plan.join, (grad_inputs, grad_rates, grad_B, grad_C))
    grad_x = grad_inputs * delta
    return grad_x, grad_rates.addcmul_(grad_inputs, x), grad_A.sum(0).t().contiguous(), grad_B, grad_C


def _entering_gradients(plan: Plan, rates: Tensor, grads: Tensor, reads: Tensor, A: Tensor) -> Tensor:
    """Return exp(delta_{t+1} A) g_{t+1} at the last token t of each chunk, [batch * chunks, k, c]."""
    decays = A.new_empty(*rates.shape[1:3], *A.shape)
    g = torch.empty_like(decays)
    carry = torch.zeros_like(g[0])
    for block in reversed(range(plan.blocks)):
        _decay(rates[block], A, decays)
        _outer(grads[block], reads[block], g)
        carry = _recur_back(decays, g, carry)
    return plan.chain(carry, _gain(rates, A), reverse=True)


def _plan(x: Tensor, A: Tensor) -> Plan:
    return Plan.of(x.shape[0], x.shape[1], A.numel(), x.device.type)


def _decay(rates: Tensor, A: Tensor, out: Tensor) -> None:
    """Write exp(delta A) [..., k, c] for rates [..., c] and A [k, c]."""
    # 2^x takes a quarter of the time of e^x in PyTorch on a CPU, and a fiftieth if the result underflows.
    torch.mul(rates.unsqueeze(-2), A * LOG2_E, out=out).exp2_()


def _gain(rates: Tensor, A: Tensor) -> Tensor:
    """Return the product of all decays of each lane, [lanes, k, c]: the exponent is a sum that is never positive."""
    gain = rates.new_empty(rates.shape[2], *A.shape)
    _decay(rates.sum((0, 1)), A, gain)
    return gain


def _outer(inputs: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write the products [steps, lanes, k, c] of inputs [steps, lanes, c] and weights [steps, lanes, k]."""
    torch.mul(inputs.unsqueeze(2), weights.unsqueeze(3), out=out)


def _read(weights: Tensor, h: Tensor, out: Tensor) -> None:
    """Write sum_k weights[..., k] h[..., k, c] to out [steps, lanes, c]."""
    torch.bmm(weights.flatten(0, 1).unsqueeze(1), h.flatten(0, 1), out=out.view(-1, 1, out.shape[-1]))


def _project(h: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write sum_c h[..., k, c] weights[..., c] to out [steps, lanes, k]."""
    # As a row times a transposed matrix: a matrix times a column takes seven times as long in MKL.
    torch.bmm(weights.flatten(0, 1).unsqueeze(1), h.flatten(0, 1).mT, out=out.view(-1, 1, out.shape[-1]))


def _recur(decays: Iterable[Tensor], terms: Iterable[Tensor], state: Tensor) -> Tensor:
    """Turn terms b_1, b_2, ... into states h_t = a_t h_{t-1} + b_t, in place, and return the last."""
    for decay, term in zip(decays, terms, strict=True):
        state = term.addcmul_(decay, state)
    return state


def _recur_back(decays: Tensor, terms: Tensor, carry: Tensor) -> Tensor:
    """Turn terms into g_t = a_{t+1} g_{t+1} + b_t, in place, from the last to the first.

    Args:
        decays: Factors a_t of the block, [steps, ...].
        terms: Terms b_t of the block, of the same shape.
        carry: Product a g of the step after the block, [...].

    Returns:
        The product a g of the block's first step.
    """
    last = terms[-1].add_(carry)
    return decays[0] * _recur(reversed(decays[1:].unbind()), reversed(terms[:-1].unbind()), last)


@_scan.register_fake
def _(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    plan = _plan(x, A)
    channels, state = A.shape
    return torch.empty_like(x).contiguous(), x.new_empty(plan.blocks, plan.batch * plan.chunks, state, channels)


@_scan_backward.register_fake
def _(
    grad: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, delta, A, B, C = (value.new_empty(value.shape) for value in (x, delta, A, B, C))
    return x, delta, A, B, C


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return cast(tuple[Tensor, ...], _scan_backward(grad, *ctx.saved_tensors))


_scan.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op("satfusion::fused_scan", mutates_args=())
def _fused_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Return y [batch, c, n] of mamba_ssm, and the data for its backward pass, [batch, c, chunks, 2 k].

    It is one operator for ``torch.compile``, which cannot trace the extension. ``u`` and ``delta`` are [batch, c, n],
    ``B`` and ``C`` [batch, k, n], all contiguous.
    """
    y, states = import_mamba().fwd(u, delta, A, B.unsqueeze(1), C.unsqueeze(1), D, None, None, False)[:2]
    return y, states


@torch.library.custom_op("satfusion::fused_scan_backward", mutates_args=())
def _fused_scan_backward(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, delta, A, B, C and D from that of y."""
    B, C = B.unsqueeze(1), C.unsqueeze(1)
    # No gate, no bias of the steps, no result before the gate, no buffer for the gate's gradient; no softplus.
    grads = import_mamba().bwd(u, delta, A, B, C, D, None, None, grad, states, None, None, False, False)
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D = grads[:6]
    return grad_u, grad_delta, grad_A, grad_B.squeeze(1), grad_C.squeeze(1), grad_D


@_fused_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, tokens = u.shape
    return u.new_empty(u.shape), u.new_empty(batch, channels, -(-tokens // FUSED_CHUNK), 2 * A.shape[1])


@_fused_scan_backward.register_fake
def _(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    u, delta, A, B, C, D = (value.new_empty(value.shape) for value in (u, delta, A, B, C, D))
    return u, delta, A, B, C, D


def _differentiate_fused(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return cast(tuple[Tensor, ...], _fused_scan_backward(grad.contiguous(), *ctx.saved_tensors))


_fused_scan.register_autograd(_differentiate_fused, setup_context=_keep)
for _op in (_scan, _scan_backward, _fused_scan, _fused_scan_backward):
    for _device in ("cpu", "cuda"):
        _op.register_autocast(_device, torch.float32)


@register_flop_formula([torch.ops.satfusion.selective_scan, torch.ops.satfusion.fused_scan])
def _forward_flops(x: Sequence[int], delta: Sequence[int], A: Sequence[int], *_: Any, **__: Any) -> int:
    return FORWARD_FLOPS * math.prod(x) * A[1]


@register_flop_formula([torch.ops.satfusion.selective_scan_backward, torch.ops.satfusion.fused_scan_backward])
def _backward_flops(
    grad: Sequence[int], x: Sequence[int], delta: Sequence[int], A: Sequence[int], *_: Any, **__: Any
) -> int:
    return BACKWARD_FLOPS * math.prod(x) * A[1]
