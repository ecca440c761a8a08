"""Cost of a model: parameters, floating-point operations and the memory of its activations, without computing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from models.config import ModelConfig
from models.contracts import Size
from models.registry import build_model

Shape = Sequence[int]


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""The one attention that PyTorch's counter does not count."""


@dataclass(frozen=True)
class Cost:
    """The cost of one chip."""

    parameters: int
    """Trainable parameters, each counted once."""

    flops: int
    """Floating-point operations of a forward pass: two per multiply-add, of convolutions, matrix products, attention
    and scans; element-wise operations are not counted."""

    activation_bytes: int
    """Bytes that a forward pass in float32 keeps for the backward pass, in addition to the parameters."""


def cost(config: ModelConfig, lr: Size, pan: Size) -> Cost:
    """Return the cost of one sample; computed from shapes alone, so it takes no memory and hardly any time.

    Args:
        config: The model.
        lr: Height and width of the revisits, pixels.
        pan: Height and width of the panchromatic image, pixels.

    Raises:
        ValueError: If the model cannot take these sizes.
    """
    with FakeTensorMode():
        # Training mode, except for decisions that training takes from values: ARConv's kernels are as stored.
        model = build_model(config).eval()
        model.at_step(config.kernel_freeze_step)
        images = torch.empty(1, config.revisits, config.bands, *lr), torch.empty(1, 1, *pan)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter, _kept(model) as kept:
            fusion = model(*images)
        activations = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del fusion
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Cost(trainable, counter.get_total_flops(), activations)


@contextmanager
def _kept(model: torch.nn.Module) -> Iterator[dict[int, Tensor]]:
    """Collect the tensors that autograd keeps for the backward pass, once per storage, without the model's own."""
    own = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
