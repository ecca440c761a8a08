"""ARConv: a small U-Net of adaptive rectangular convolutions."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import check_published_grid
from models.config import ModelConfig
from models.contracts import Head, NamePairs, Size
from models.heads.arconv.adaptive import AdaptiveConv, adaptive_names

DROPOUT = 0.3
WIDTH = 32
SHRINKING = 4
"""Ratio of the finest grid to the coarsest."""


class ARConv(Head):
    """Residual blocks x -> x + A2(relu(A1 x)) of adaptive convolutions A on three grids, joined as in a U-Net.

    Wang et al., "Adaptive Rectangular Convolution for Remote Sensing Pansharpening", CVPR 2025, arXiv 2503.00467: the
    paper's ARNet, 32, 64 and 128 channels wide at H x W, H/2 x W/2 and H/4 x W/4; A is an `AdaptiveConv`. Sizes that
    cannot be halved twice are padded by repeating the last row and column, which the published form cannot.
    """

    may_leave_idle = True
    """A step uses one of each convolution's nine kernels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.freeze_step = config.kernel_freeze_step

        def block(width: int) -> ResidualBlock:
            dropout = DROPOUT if config.dropout == "published" else 0.0
            return ResidualBlock(*(AdaptiveConv(width, dropout, follows_batch=config.published) for _ in range(2)))

        self.head_conv = nn.Conv2d(config.bands + 1, WIDTH, 3, padding=1)
        self.rb1 = block(WIDTH)
        self.down1 = _down(WIDTH)
        self.rb2 = block(2 * WIDTH)
        self.down2 = _down(2 * WIDTH)
        self.rb3 = block(4 * WIDTH)
        self.up1 = Up(4 * WIDTH)
        self.rb4 = block(2 * WIDTH)
        self.up2 = Up(2 * WIDTH)
        self.rb5 = block(WIDTH)
        self.tail_conv = nn.Conv2d(WIDTH, config.bands, 3, padding=1)

    @classmethod
    def check_sizes(cls, config: ModelConfig, lr: Size, pan: Size) -> None:
        """Refuse a coarsest grid of one pixel, and in the published form sizes that cannot be halved twice."""
        if max(pan) <= SHRINKING:
            raise ValueError(
                f"ARConv normalises over the pixels of its coarsest grid, a quarter of a side, and of a PAN of "
                f"{pan[0]} x {pan[1]} px that is a single pixel: it needs one side of at least {SHRINKING + 1} px"
            )
        check_published_grid(config, pan, SHRINKING, "ARConv")

    def forward(self, ms: Tensor, pan: Tensor) -> Tensor:
        """Map ms [B, C, H, W] and pan [B, 1, H, W] to [B, C, H, W]."""
        height, width = ms.shape[-2:]
        both = torch.cat([pan, ms], dim=1)
        if height % SHRINKING or width % SHRINKING:
            both = F.pad(both, (0, -width % SHRINKING, 0, -height % SHRINKING), mode="replicate")
        x1 = self.rb1(self.head_conv(both))
        x2 = self.rb2(self.down1(x1))
        x3 = self.rb3(self.down2(x2))
        x4 = self.rb4(self.up1(x3, x2))
        x5 = self.rb5(self.up2(x4, x1))
        detail: Tensor = self.tail_conv(x5)
        return detail[..., :height, :width]

    @property
    def is_settled(self) -> bool:
        """Return whether the kernel sizes are frozen."""
        return self.rb1.conv1.frozen

    def at_step(self, step: int) -> None:
        """Freeze the kernels from the configured step on."""
        for module in self.modules():
            if isinstance(module, AdaptiveConv):
                module.frozen = step >= self.freeze_step
                # For validation between steps: ranks with different chips must not request different weights.
                module.follows_batch = False

    def published_names(self) -> NamePairs:
        """Return the published names."""
        pairs: NamePairs = ()
        for name, module in self.named_children():
            if isinstance(module, ResidualBlock):
                pairs += adaptive_names(f"{name}.conv1") + adaptive_names(f"{name}.conv2")
            elif isinstance(module, nn.Sequential):
                pairs += ((f"{name}.conv", name),)
            else:
                pairs += ((name, name),)
        return pairs


class ResidualBlock(nn.Module):
    """Two adaptive convolutions with a ReLU between, added to their input."""

    def __init__(self, conv1: AdaptiveConv, conv2: AdaptiveConv) -> None:
        super().__init__()
        self.conv1 = conv1
        self.conv2 = conv2

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        return cast(Tensor, x + self.conv2(F.relu(self.conv1(x))))


class Up(nn.Module):
    """Upsampling by 2 that halves the channels and adds the skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.ConvTranspose2d(channels, half, 2, stride=2)
        self.conv2 = nn.Sequential(_depthwise(half), nn.Conv2d(half, half, 1), nn.LeakyReLU())

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map [B, C, H, W] and ``skip`` [B, C / 2, 2H, 2W] to the shape of ``skip``."""
        return cast(Tensor, self.conv2(F.leaky_relu(self.conv1(x)) + skip))


def _down(channels: int) -> nn.Sequential:
    """Return a layer that halves the size and doubles the channels."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 2, stride=2),
        nn.LeakyReLU(),
        _depthwise(channels),
        nn.Conv2d(channels, 2 * channels, 1),
    )


def _depthwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
