"""Forward and backward pass without a wait of the host for a GPU: no value is read, nothing is copied to it.

Tensors of the device ``meta`` stand for a GPU's: they have no values, so code that reads one raises.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.config import ModelConfig
from models.registry import ABSENT, all_pairs, build_model
from models.satfusion import Fusion
from pipeline.quality.losses import PLACEMENTS, LossConfig, Placement, fusion_loss
from pipeline.quality.registration import MODES, Mode

META = torch.device("meta")

STAGES_FIRST = [
    pytest.param(*pair, marks=() if ABSENT in pair or pair == ("srcnn", "pnn") else pytest.mark.slow)
    for pair in all_pairs()
]
"""Each stage alone and one pair; the other pairs, built of the same stages, take a minute."""


def devices(values: Any) -> set[str]:
    """Return the devices of all tensors except those that a call takes as plain numbers."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return {tensor.device.type for tensor in tensors if tensor.ndim or tensor.device.type != "cpu"}


class NoCopies(TorchDispatchMode):
    """Mode that refuses operators which take tensors of the host for the device's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert len(devices((args, kwargs, result))) < 2, f"{func} takes a tensor from the host to the device"
        return result


class NoNumbers(TorchFunctionMode):
    """Mode that refuses device tensors made from the host's numbers, a copy below the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            assert not isinstance(args[1], list), "the numbers of an index are copied to the device"
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
        assert not made or "meta" not in devices(result), f"{func} copies the host's numbers to the device"
        return result


@contextmanager
def unsynchronised() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(NoCopies())
        stack.enter_context(NoNumbers())
        yield


@pytest.fixture(autouse=True)
def _autocast_knows_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda device, *args, **kwargs: autocast(device.replace("meta", "cpu"), *args, **kwargs)
    )


@pytest.mark.parametrize(
    "offence",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: 1 if x.sum() > 0 else 0,
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[[0, 1]],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.cpu(),
        lambda x: x * torch.ones(3).to(x),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x * x.new_tensor([1, 2, 3]),
        lambda x: x * torch.tensor([1, 2, 3], device=x.device),
    ],
)
def test_what_would_wait_is_noticed(offence: Callable[[Tensor], object]) -> None:
    with unsynchronised(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        offence(torch.empty(3, device=META))


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("encoder", "head"), STAGES_FIRST)
def test_no_network_waits_for_the_device(encoder: str, head: str, published: bool) -> None:
    """What would wait raises, as `test_what_would_wait_is_noticed` shows; the backward pass reaches every stage."""
    lr, pan = ((50, 50), (156, 156)) if published else ((9, 11), (31, 26))
    with META:
        network = build_model(ModelConfig(encoder, head, revisits=3, hidden=8, published=published)).train()
        images = torch.empty(2, 3, 3, *lr), torch.empty(2, 1, *pan), torch.empty(2, dtype=torch.int64)
    network.at_step(network.config.kernel_freeze_step)
    with unsynchronised():
        fused = network(*images).fused
        fused.square().mean().backward()
    assert fused.device == META
    assert any(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("registration", "placement", "adjust"), list(itertools.product(MODES, PLACEMENTS, (False, True)))
)
def test_no_loss_waits_for_the_device(registration: Mode, placement: Placement, adjust: bool) -> None:
    """What would wait raises, as `test_what_would_wait_is_noticed` shows."""
    config = LossConfig(registration=registration, placement=placement, bias_adjust=adjust, angle=1.0, consistency=1.0)
    size = (2, 3, 24, 28)
    images = Fusion(*(torch.empty(size, device=META, requires_grad=True) for _ in range(3)))
    target, lr = torch.empty(size, device=META), torch.empty(2, 4, 3, 12, 14, device=META)
    fusion_loss(images, target, config, None, lr)  # constants are copied once
    with unsynchronised():
        fusion_loss(images, target, config, None, lr).total.mean().backward()
    assert images.fused.grad is not None
