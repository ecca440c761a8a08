"""PanNet: two residual blocks between two convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.contracts import Head, NamePairs


class PanNet(Head):
    """Residual blocks x -> relu(W2 relu(W1 x) + shortcut(x)) of 64, 64 and 32 channels between two convolutions.

    Yang et al., "PanNet: A Deep Network Architecture for Pan-Sharpening", ICCV 2017: a residual network of the
    stacked images [B, C + 1, H, W]. As published with SatFusion: without the paper's high-pass filters.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv2d(config.bands + 1, 64, 9, padding=4)
        self.res_block1 = ResidualBlock(64, 64)
        self.res_block2 = ResidualBlock(64, 32)
        self.conv3 = nn.Conv2d(32, config.bands, 5, padding=2)

    def forward(self, ms: Tensor, pan: Tensor) -> Tensor:
        """Map ms [B, C, H, W] and pan [B, 1, H, W] to [B, C, H, W]."""
        x = F.relu(self.conv1(torch.cat([ms, pan], dim=1)))
        detail: Tensor = self.conv3(self.res_block2(self.res_block1(x)))
        return detail

    def published_names(self) -> NamePairs:
        """Return the published names, in which the shortcut is the only entry of a sequence."""
        same = ("conv1", "res_block1", "res_block2.conv1", "res_block2.conv2")
        return (
            *((name, name) for name in same),
            ("res_block2.shortcut.0", "res_block2.shortcut"),
            ("conv3", "conv3"),
        )


class ResidualBlock(nn.Module):
    """Two 5x5 convolutions beside a shortcut, with the ReLU after their sum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 5, padding=2)
        self.conv2 = nn.Conv2d(outputs, outputs, 5, padding=2)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H, W]."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))
