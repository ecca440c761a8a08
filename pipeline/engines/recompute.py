"""Activation checkpointing: blocks of the network compute their activations again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.satfusion import SatFusion

_CONTAINERS = (nn.ModuleList, nn.Sequential)


def recompute_blocks(network: SatFusion) -> int:
    """Let the blocks of both stages keep only their inputs for the backward pass, which computes the rest again.

    A block is a child of a stage, or of its lists and sequences, that has children: a convolution alone keeps no more
    than its input. Values and gradients stay the same bit for bit, dropout included.

    Returns:
        The number of blocks.
    """
    blocks = [block for stage in (network.encoder, network.head) if stage is not None for block in _blocks(stage)]
    for block in blocks:
        block.forward = functools.partial(_again, block.forward)
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from _blocks(child)
        elif next(child.children(), None) is not None:
            yield child


def _again(forward: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)
