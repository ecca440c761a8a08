"""Influence of each revisit on the fused image, measured by leaving it out: the same for every model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.quality.consistency import revisits_median


def revisit_shares(lr: Tensor, fused: Tensor, fuse: Callable[[Tensor], Tensor]) -> list[float]:
    """Return the share of each revisit in what they change of one chip's image; the sum is 1, or 0 if none counts.

    Each revisit in turn is replaced by the median of the others; its share is the mean absolute change of the fused
    image, divided by the sum of all changes. So a revisit counts little if the model ignores it, and also if it
    shows what the others show. A single revisit has share 1, one without data 0.

    Args:
        lr: Revisits [1, R, C, h, w], reflectance.
        fused: Image [1, C, H, W] fused from them.
        fuse: Returns the image [1, C, H, W] for other revisits; called R times, or not for a single revisit.
    """
    revisits = lr.shape[1]
    if revisits == 1:
        return [1.0]
    changes = []
    for revisit in range(revisits):
        others = [other for other in range(revisits) if other != revisit]
        without = lr.clone()
        without[:, revisit] = revisits_median(lr[:, others])[0]
        change = (fuse(without) - fused).abs().mean()
        changes.append(change * lr[:, revisit].any())
    total = torch.stack(changes).double()
    return (total / total.sum().clamp(min=torch.finfo(torch.float64).tiny)).tolist()
