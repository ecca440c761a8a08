"""Tensors that depend on sizes and settings alone, created once for each device and type."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")

CPU = torch.device("cpu")


def constant(make: Callable[Concatenate[torch.device, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Turn ``make(device, ...)`` into ``get(like, ...)``, whose tensors have the device and type of ``like``.

    The tensors are created on the CPU, copied once and cached, because a copy from the host's pageable memory makes the
    host wait for all work queued on a GPU. So no caller may write into them, and the other arguments must be hashable.
    A compiled graph creates them again on its own device: it cannot hold the cached tensors.
    """
    kept: dict[Hashable, Tensor] = {}

    @functools.wraps(make)
    def get(like: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return make(like.device, *args, **kwargs).to(like.dtype)
        key = (like.device, like.dtype, args, tuple(kwargs.items()))
        if key not in kept:
            with torch.inference_mode(False):
                value = make(CPU, *args, **kwargs).to(like.device, like.dtype)
            if type(value) is not Tensor:
                return value  # a stand-in of FakeTensorMode, which has no use outside of it
            kept[key] = value
        return kept[key]

    return get
