"""RAMS: residual attention over revisits and pixels at once."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import check_published_bands, check_reflectable
from models.config import ModelConfig
from models.contracts import Encoder, NamePairs, Size, under

FILTERS = 32
BLOCKS = 12
REDUCTION = 8
"""Channels of a block per channel of its attention."""


class RAMS(Encoder):
    """Convolutions over revisits, rows and columns, which drop two revisits at a time until one feature map is left.

    Salvetti, Mazzia, Khaliq, Chiaberge, "Multi-Image Super Resolution of Remotely Sensed Images Using Residual
    Attention Deep Neural Networks", Remote Sensing 12(14):2207, 2020: a main branch of 3-D residual feature attention
    blocks (RFAB) and temporal reduction, and a global residual of one 2-D residual temporal attention block (RTAB). As
    published with SatFusion: no weight normalisation, and one RFAB whose weights serve all its uses.

    The number of revisits is fixed when the model is built: revisits are channels of the RTAB, and set the number of
    reductions of the main branch. The published form requires 3 bands and at least 3 revisits, and always holds the
    last convolutions of both odd and even numbers of revisits, although it uses only one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        channels = config.bands * config.revisits
        self.revisits = config.revisits
        self.reductions = max(0, (config.revisits - 2) // 2)
        left = config.revisits - 2 * self.reductions
        self.begin = nn.Conv3d(config.bands, FILTERS, 3, padding=1)
        self.rfab = AttentionBlock(nn.Conv3d, FILTERS)
        self.end = nn.Conv3d(FILTERS, FILTERS, 3, padding=1)
        self.reduce = _drop_revisits(FILTERS, 3) if self.reductions or config.published else None
        self.flatten = _drop_revisits(config.hidden, left)
        self.idle_flatten = _drop_revisits(config.hidden, 5 - left) if config.published else None
        self.rtab = AttentionBlock(nn.Conv2d, channels)
        self.widen = nn.Conv2d(channels, config.hidden, 3, padding=1, padding_mode="reflect", bias=False)

    @classmethod
    def check_config(cls, config: ModelConfig) -> None:
        """Refuse bands and revisits that the published model cannot take."""
        check_published_bands(config, "RAMS")
        if config.published and config.revisits < 3:
            raise ValueError(
                f"the published RAMS cannot take revisits = {config.revisits}: it reduces them to 3 or 2, and its "
                f"attention needs 8 channels; with published = false it takes any number"
            )

    @classmethod
    def check_sizes(cls, config: ModelConfig, lr: Size, pan: Size) -> None:
        """Refuse revisits too small to be mirrored at their border."""
        check_reflectable(lr, "RAMS")

    def forward(self, lr: Tensor, pan: Tensor) -> Tensor:
        """Map lr [B, R, C, h, w] to features [B, D, h, w]; ``pan`` is not used."""
        if lr.shape[1] != self.revisits:
            raise ValueError(
                f"this RAMS was built for {self.revisits} revisits and was given {lr.shape[1]}: "
                f"build it with revisits = {lr.shape[1]}"
            )
        shallow = self.begin(lr.transpose(1, 2))
        x = shallow
        for _ in range(BLOCKS):
            x = self.rfab(x)
        x = self.end(x) + shallow
        for _ in range(self.reductions):
            assert self.reduce is not None  # built only if there is something to reduce
            x = F.relu(self.reduce(self.rfab(x)))
        main = self.flatten(x).squeeze(2)
        return cast(Tensor, main + self.widen(self.rtab(lr.flatten(1, 2))))

    def published_names(self) -> NamePairs:
        """Return the published names, which distinguish the last convolutions of odd and even numbers of revisits."""
        odd, even = ("flatten", "idle_flatten") if self.revisits % 2 else ("idle_flatten", "flatten")
        return (
            ("blockMISR.begin_conv3d", "begin"),
            ("blockMISR.end_conv3d", "end"),
            ("blockMISR.middle_conv3d.0", "reduce"),
            ("blockMISR.before_upsampling_Con3d", odd),
            ("blockMISR.before_upsampling_Con3d_even", even),
            ("blockMISR.before_upsampling_Con2d", "widen"),
            *_block_names("RFAB", "rfab"),
            *_block_names("RTAB", "rtab"),
        )


class AttentionBlock(nn.Module):
    """Residual block of two convolutions, with attention weights for each channel.

    x + u sigmoid(W2 ReLU(W1 mean(u))) with u = conv(ReLU(conv(x))): the paper's RFAB over [R, h, w] with
    ``nn.Conv3d``, its RTAB over [h, w] with ``nn.Conv2d``.

    Args:
        conv: ``nn.Conv3d`` or ``nn.Conv2d``.
        channels: Channels in and out.
    """

    def __init__(self, conv: type[nn.Conv2d | nn.Conv3d], channels: int) -> None:
        super().__init__()
        squeezed = max(1, channels // REDUCTION)
        self.conv1 = conv(channels, channels, 3, padding=1)
        self.conv2 = conv(channels, channels, 3, padding=1)
        self.squeeze = conv(channels, squeezed, 1)
        self.excite = conv(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, ...] to the same shape."""
        u = self.conv2(F.relu(self.conv1(x)))
        mean = u.mean(dim=tuple(range(2, u.ndim)), keepdim=True)
        weight = self.excite(F.relu(self.squeeze(mean))).sigmoid()
        return cast(Tensor, x + u * weight)


def _drop_revisits(outputs: int, kernel: int) -> nn.Conv3d:
    """Return a convolution whose result has ``kernel`` - 1 revisits fewer."""
    return nn.Conv3d(FILTERS, outputs, (kernel, 3, 3), padding=(0, 1, 1))


def _block_names(published: str, own: str) -> NamePairs:
    attention = (("attention.1", "squeeze"), ("attention.3", "excite"))
    return under(f"blockMISR.{published}", own, ("conv1", "conv1"), ("conv2", "conv2"), *attention)
