"""Floor of a model's step: its convolutions and matrix products on this machine, each alone.

`record` lists every convolution, matrix product and attention that a piece of work runs, forward and backward; `replay`
times each distinct one on random tensors of the same shapes, strides and types. Their sum is the time of a step without
any other work and without overlap: the floor that `benchmarks.step` compares steps with.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.cost import ATTENTION

aten = torch.ops.aten
HEAVY = frozenset(
    {
        aten.convolution.default,
        aten.convolution_backward.default,
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_backward.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_efficient_attention_backward.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_cudnn_attention_backward.default,
    }
)
REPEATS = 5
SECONDS = 0.5
"""Upper bound of the repetitions of a single operation."""


@dataclass(frozen=True)
class _Shape:
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> Tensor:
        # Strides may be 0 or overlap, so the memory is filled before it is viewed in that shape.
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        values = torch.empty(last + 1, dtype=self.dtype, device=self.device)
        values = values.normal_() if values.is_floating_point() else values.zero_()
        return values.as_strided(self.size, self.stride)


@dataclass(frozen=True)
class Floor:
    """Sum over the heavy operations of a piece of work."""

    flops: int
    """Floating-point operations, two per multiply-add."""
    seconds: float
    """Sum of the medians of each operation alone."""
    operations: int
    """Number of operations."""
    distinct: int
    """Number of distinct operations."""


class _Recorder(TorchDispatchMode):
    """Counts calls by operation and arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in HEAVY:
            self.calls[(function, _freeze(args), _freeze(kwargs or {}))] += 1
        return function(*args, **(kwargs or {}))


def measure_floor(work: Callable[[], object], synchronise: Callable[[], object]) -> Floor:
    """Run ``work`` once to list its operations, then time each alone.

    Args:
        work: Forward and backward pass.
        synchronise: Function that waits until the device is idle.
    """
    recorder = _Recorder()
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter, recorder:
        work()
    seconds = 0.0
    for (function, args, kwargs), count in recorder.calls.items():
        seconds += count * _seconds(function, _thaw(args), _thaw(kwargs), synchronise)
    return Floor(counter.get_total_flops(), seconds, sum(recorder.calls.values()), len(recorder.calls))


def _seconds(function: Any, args: Any, kwargs: Any, synchronise: Callable[[], object]) -> float:
    times: list[float] = []
    function(*args, **kwargs)
    synchronise()
    while len(times) < REPEATS and sum(times) < SECONDS:
        began = time.perf_counter()
        function(*args, **kwargs)
        synchronise()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _freeze(value: Any) -> Any:
    """Return a hashable form of arguments, tensors replaced by their shapes."""
    if isinstance(value, Tensor):
        return _Shape(tuple(value.shape), tuple(value.stride()), value.dtype, value.device)
    if isinstance(value, dict):
        return ("dict", tuple((name, _freeze(item)) for name, item in value.items()))
    if isinstance(value, list | tuple):
        return (type(value).__name__, tuple(map(_freeze, value)))
    return value


def _thaw(value: Any) -> Any:
    """Undo `_freeze`, with random tensors."""
    if isinstance(value, _Shape):
        return value.tensor()
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "dict":
        return {name: _thaw(item) for name, item in value[1]}
    if isinstance(value, tuple) and len(value) == 2 and value[0] in ("list", "tuple"):
        items = [_thaw(item) for item in value[1]]
        return items if value[0] == "list" else tuple(items)
    return value
