"""Batches of one chip from images, without a dataset."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.batches import Batch


def make_batch(lr: Tensor, pan: Tensor, hr: Tensor, revisit: int = 0) -> Batch:
    """Return a batch of revisits [1, R, C, h, w], PAN [1, 1, H, W] and target [1, C, H, W]."""
    return Batch(lr, pan, hr, torch.tensor([revisit]), torch.ones(1), (7,))
