"""PNN: three convolutions."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.contracts import Head


class PNN(Head):
    """Three convolutions: detail = W3 relu(W2 relu(W1 [ms; pan])), 9, 5 and 5 px wide, C + 1 -> 64 -> 32 -> C channels.

    Masi et al., "Pansharpening by Convolutional Neural Networks", Remote Sensing 8(7):594, 2016.
    """

    adds_input: ClassVar[bool] = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv2d(config.bands + 1, 64, 9, padding=4)
        self.conv2 = nn.Conv2d(64, 32, 5, padding=2)
        self.conv3 = nn.Conv2d(32, config.bands, 5, padding=2)

    def forward(self, ms: Tensor, pan: Tensor) -> Tensor:
        """Map ms [B, C, H, W] and pan [B, 1, H, W] to [B, C, H, W]."""
        x = F.relu(self.conv1(torch.cat([ms, pan], dim=1)))
        return cast(Tensor, self.conv3(F.relu(self.conv2(x))))
