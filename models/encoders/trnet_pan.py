"""The encoder of SatFusion*: TR-MISR guided by the panchromatic image."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import bilinear, check_published_bands, resize
from models.config import ModelConfig
from models.contracts import Encoder, NamePairs, Size
from models.encoders.trnet import (
    PAN_FEATURES,
    WIDTH,
    PanToken,
    RevisitFusion,
    check_published_size,
    dropout_rate,
    published_names,
)


class TRNetPan(Encoder):
    """TR-MISR that sees PAN twice: as a band of every revisit, and as the token of every pixel.

    Tong et al., "SatFusion: A Unified Framework for Enhancing Remote Sensing Images via Multi-Frame and Multi-Source
    Images Fusion", arXiv 2510.07905 (version 4, SatFusion*). PAN is shrunk to the grid of the revisits, and blurred
    first so that detail finer than their pixels does not alias. The published form shrinks without the blur, holds the
    learned token of TR-MISR unused, and requires 3 bands, 50 x 50 px and the number of revisits it was built for.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.revisits = config.revisits if config.published else None
        self.shrink = bilinear if config.published else resize
        self.pan_conv1 = nn.Conv2d(1, PAN_FEATURES, 3, padding=1)
        self.pan_conv2 = nn.Conv2d(PAN_FEATURES, PAN_FEATURES, 3, padding=1)
        self.fusion = RevisitFusion(config.bands + 1, config.hidden, dropout_rate(config))
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH)) if config.published else None
        self.pan_token = PanToken()

    @classmethod
    def check_config(cls, config: ModelConfig) -> None:
        """Refuse bands that the published model cannot take."""
        check_published_bands(config, "SatFusion* encoder")

    @classmethod
    def check_sizes(cls, config: ModelConfig, lr: Size, pan: Size) -> None:
        """Refuse the sizes that the published model cannot take."""
        check_published_size(config, lr, "SatFusion* encoder")

    def forward(self, lr: Tensor, pan: Tensor) -> Tensor:
        """Map lr [B, R, C, h, w], guided by pan [B, 1, H, W], to features [B, D, h, w]."""
        if self.revisits not in (None, lr.shape[1]):
            raise ValueError(
                f"this SatFusion* encoder was built for {self.revisits} revisits, which the published one copies PAN "
                f"to, and was given {lr.shape[1]}: with published = false it takes any number"
            )
        pan = self.shrink(pan, (lr.shape[-2], lr.shape[-1]))
        beside = pan.unsqueeze(1).expand(-1, lr.shape[1], -1, -1, -1)
        features = self.pan_conv2(F.relu(self.pan_conv1(pan)))
        return cast(Tensor, self.fusion(torch.cat([lr, beside], dim=2), self.pan_token(features)))

    def published_names(self) -> NamePairs:
        """Return the published names."""
        return (("pan_encoder.0", "pan_conv1"), ("pan_encoder.2", "pan_conv2"), *published_names())
