"""SRCNN over several revisits, as in the WorldStrat baseline."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from models.blocks import DoubleConv, check_reflectable, double_conv_names
from models.config import ModelConfig
from models.contracts import Encoder, NamePairs, Size

DROPOUT = 0.5


class SRCNN(Encoder):
    """Encoder of each revisit beside the median revisit, and a fusion of all of them by convolution.

    F = x + g(x) with x = m([e([lr_1; median]); ...; e([lr_R; median])]), two 3 x 3 convolutions each: e encodes
    [R B, 2C, h, w] to D channels, m merges [B, R D, h, w] to D, g keeps D.

    The multi-frame form of SRCNN: Cornebise, Orsolic, Kalaitzis, "Open High-Resolution Satellite Imagery: The
    WorldStrat Dataset", NeurIPS Datasets and Benchmarks 2022; named after Dong et al., TPAMI 2016. The number of
    revisits is fixed when the model is built, because all of them become channels.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dropout = DROPOUT if config.dropout == "published" else 0.0
        self.revisits = config.revisits
        self.encode = DoubleConv(2 * config.bands, config.hidden, dropout)
        self.merge = DoubleConv(config.revisits * config.hidden, config.hidden, dropout)
        self.residual = DoubleConv(config.hidden, config.hidden, dropout)

    @classmethod
    def check_sizes(cls, config: ModelConfig, lr: Size, pan: Size) -> None:
        """Refuse revisits too small to be mirrored at their border."""
        check_reflectable(lr, "SRCNN")

    def forward(self, lr: Tensor, pan: Tensor) -> Tensor:
        """Map lr [B, R, C, h, w] to features [B, D, h, w]; ``pan`` is not used."""
        if lr.shape[1] != self.revisits:
            raise ValueError(
                f"this SRCNN was built for {self.revisits} revisits and was given {lr.shape[1]}: "
                f"build it with revisits = {lr.shape[1]}"
            )
        reference = lower_median(lr).unsqueeze(1).expand_as(lr)
        # A sample's revisits are adjacent in the batch, so its channels are ordered revisit by revisit.
        features = self.encode(torch.cat([lr, reference], dim=2).flatten(0, 1))
        x = self.merge(features.reshape(lr.shape[0], -1, *lr.shape[-2:]))
        return cast(Tensor, x + self.residual(x))

    def published_names(self) -> NamePairs:
        """Return the published names; there both convolutions of the fusion are registered twice."""
        return (
            *double_conv_names("encoder", "encode"),
            *double_conv_names("blockMISR.doubleconv2d", "merge"),
            *double_conv_names("blockMISR.residualblocks.0.residualblock", "residual"),
            *double_conv_names("blockMISR.fusion_SRCNN.0", "merge"),
            *double_conv_names("blockMISR.fusion_SRCNN.1.0.residualblock", "residual"),
        )


def lower_median(lr: Tensor) -> Tensor:
    """Return the median [B, C, h, w] over the revisits of lr [B, R, C, h, w], the lower one for even R."""
    # Not torch.median: with indices it has no deterministic CUDA kernel.
    return lr.sort(dim=1).values[:, (lr.shape[1] - 1) // 2]
