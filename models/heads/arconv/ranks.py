"""Computation over all ranks of a training: means, and batch norms that use them."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

PIXELS = (0, 2, 3)
"""The axes that a batch norm of [B, C, H, W] averages over."""


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of every rank's ``value``, the same on all ranks; differentiable.

    All ranks must call it, with equal shapes. Without a process group, or with a single process, it returns ``value``
    itself.
    """
    return value if _num_ranks() == 1 else cast(Tensor, _MeanOverRanks.apply(value))  # type: ignore[no-untyped-call]


class RankBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose statistics in training are those of all ranks' equally large micro-batches.

    Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 1. PyTorch's own synchronised one needs CUDA. In
    evaluation mode, and on a single rank, it is PyTorch's batch norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        ranks = _num_ranks()
        if ranks == 1 or not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Two passes: the difference of mean square and squared mean would cancel for a large mean.
        mean = mean_over_ranks(wide.mean(PIXELS, keepdim=True))
        centred = wide - mean
        variance = mean_over_ranks(centred.square().mean(PIXELS, keepdim=True))
        self._track(mean.flatten(), variance.flatten(), ranks * x.numel() // x.shape[1])
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(1, -1, 1, 1)
        return (centred * scale + self.bias.view(1, -1, 1, 1)).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics towards a batch's; the stored variance is the unbiased one."""
        assert self.running_mean is not None  # None only without tracking
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var), self.momentum)


class _MeanOverRanks(torch.autograd.Function):
    """The mean over ranks; each rank's value is part of every rank's mean, so the gradient is a mean too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return mean_over_ranks(gradients[0])


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
