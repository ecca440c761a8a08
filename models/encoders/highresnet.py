"""HighRes-net: recursive pairwise fusion of revisits."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import DoubleConv, check_reflectable, double_conv_names, reflect_conv
from models.config import ModelConfig
from models.contracts import Encoder, NamePairs, Size

DROPOUT = 0.5


class HighResNet(Encoder):
    """Encoder of each revisit alone; one shared fusion block then halves their number until one is left.

    s_i = prelu(W (z + g(z))) with z = [s_i; s_j], the features of a pair of revisits [B, 2D, h, w], at each level.
    Deudon et al., "HighRes-net: Recursive Fusion for Multi-Frame Super-Resolution of Satellite Imagery", arXiv
    2002.06460. As published with SatFusion: no reference channel. If the number of revisits is odd, the revisit without
    a partner passes unchanged to the next level, which equals the paper's mask alpha = 0 of an absent partner (section
    3.2); the published form fuses it with empty feature maps, up to a power of two. The block is one set of weights, so
    a model that was built for two revisits or more takes any number of them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dropout = DROPOUT if config.dropout == "published" else 0.0
        self.published = config.published
        self.levels = (config.revisits - 1).bit_length()
        self.encode = DoubleConv(config.bands, config.hidden, dropout)
        self.fuse = PairFusion(config.hidden, dropout) if self.levels else None

    @classmethod
    def check_sizes(cls, config: ModelConfig, lr: Size, pan: Size) -> None:
        """Refuse revisits too small to be mirrored at their border."""
        check_reflectable(lr, "HighRes-net")

    def forward(self, lr: Tensor, pan: Tensor) -> Tensor:
        """Map lr [B, R, C, h, w] to features [B, D, h, w]; ``pan`` is not used."""
        batch, revisits = lr.shape[:2]
        x = self.encode(lr.flatten(0, 1)).unflatten(0, (batch, revisits))
        if revisits == 1:
            return cast(Tensor, x.squeeze(1))
        if self.fuse is None:
            raise ValueError(
                f"this HighRes-net was built for a single revisit, cannot fuse several, and was given "
                f"{revisits}: build it with revisits = {revisits}"
            )
        if self.published:
            x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, (1 << (revisits - 1).bit_length()) - revisits))
        while x.shape[1] > 1:
            pairs = x.shape[1] // 2
            ahead = x.shape[1] - pairs
            fused = self.fuse(torch.cat([x[:, :pairs], x[:, ahead:]], dim=1))
            x = torch.cat([fused, x[:, pairs:ahead]], dim=1)
        return cast(Tensor, x.squeeze(1))

    def published_names(self) -> NamePairs:
        """Return the published names; there the fusion block is registered once per level."""
        names = double_conv_names("encoder", "encode")
        for level in range(self.levels):
            block = f"blockMISR.fusion.{level}.fuse"
            names += double_conv_names(f"{block}.0.residualblock", "fuse.residual")
            names += ((f"{block}.1", "fuse.conv"), (f"{block}.3", "fuse.act"))
        return names


class PairFusion(nn.Module):
    """Fusion of revisit i of the first half with revisit i of the second half."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.residual = DoubleConv(2 * hidden, 2 * hidden, dropout)
        self.conv = reflect_conv(2 * hidden, hidden)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 2n, D, h, w] to [B, n, D, h, w]."""
        batch, revisits = x.shape[:2]
        first, second = x.chunk(2, dim=1)
        pairs = torch.cat([first, second], dim=2).flatten(0, 1)
        fused = self.act(self.conv(pairs + self.residual(pairs)))
        return cast(Tensor, fused.unflatten(0, (batch, revisits // 2)))
