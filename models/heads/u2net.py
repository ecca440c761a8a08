"""U2Net: two U-Nets, of the multispectral and the panchromatic image, joined by attention at every level."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import check_published_bands, check_published_grid
from models.config import ModelConfig
from models.contracts import Head, NamePairs, Size, under

WIDTHS = (32, 64, 128, 64, 32)
"""Channels of both streams per level."""

HEAD_WIDTH = 16
GRID = 4
"""Divisor of the padded image sides, because sizes are halved twice."""


class U2Net(Head):
    """Two U-shaped streams with joint down- and upsampling; the spectral stream takes from the spatial one.

    Peng et al., "U2Net: A General Framework with Spatial-Spectral-Integrated Double U-Net for Image Fusion", ACM
    Multimedia 2023. The attention over all n = H W pixels is evaluated without its n x n weights. Images that cannot be
    halved twice are padded by repeating their lower and right edge, and the result is cropped; the published form takes
    3 bands and sides divisible by 4, and holds unused layers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        published = config.published
        self.raise_ms = nn.Conv2d(config.bands, WIDTHS[0], 3, padding=1)
        self.raise_pan = nn.Conv2d(1, WIDTHS[0], 3, padding=1)
        self.fuse = nn.ModuleList(SpatialSpectralBlock(width) for width in WIDTHS)
        self.refine = nn.ModuleList(ResidualBlock(width) for width in WIDTHS[:-1])
        self.down = nn.ModuleList(Down(width, published) for width in WIDTHS[:2])
        self.up = nn.ModuleList(Up(width, published) for width in WIDTHS[2:4])
        self.conv1 = nn.Conv2d(WIDTHS[-1], WIDTHS[-1], 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTHS[-1], config.bands, 3, padding=1)
        self.idle = nn.Conv2d(config.bands, 16 * config.bands, 3, padding=1, bias=False) if published else None

    @classmethod
    def check_config(cls, config: ModelConfig) -> None:
        """Refuse bands that the published model cannot take."""
        check_published_bands(config, "U2Net")

    @classmethod
    def check_sizes(cls, config: ModelConfig, lr: Size, pan: Size) -> None:
        """Refuse sizes that the published model cannot take."""
        check_published_grid(config, pan, GRID, "U2Net")

    def forward(self, ms: Tensor, pan: Tensor) -> Tensor:
        """Map ms [B, C, H, W] and pan [B, 1, H, W] to [B, C, H, W]."""
        height, width = pan.shape[-2:]
        padding = (0, -width % GRID, 0, -height % GRID)
        x = F.leaky_relu(self.raise_ms(F.pad(ms, padding, mode="replicate")))
        y = F.leaky_relu(self.raise_pan(F.pad(pan, padding, mode="replicate")))
        skips = []
        for fuse, refine, down in zip(self.fuse[:2], self.refine[:2], self.down, strict=True):
            x, y = fuse(x, y), refine(y)
            skips.append((x, y))
            x, y = down(x), down(y)
        for fuse, refine, up in zip(self.fuse[2:4], self.refine[2:], self.up, strict=True):
            x, y = fuse(x, y), refine(y)
            skip_x, skip_y = skips.pop()
            x, y = up(x, skip_x), up(y, skip_y)
        x = self.fuse[4](x, y)
        return cast(Tensor, self.conv2(F.leaky_relu(self.conv1(x)))[..., :height, :width])

    def published_names(self) -> NamePairs:
        """Return the published names, which number the parts of each level."""
        names: NamePairs = (("upsample.upsamle.0", "idle"), ("raise_ms_dim.0", "raise_ms"))
        names += (("raise_pan_dim.0", "raise_pan"), ("to_hrms.0", "conv1"), ("to_hrms.2", "conv2"))
        for level in range(len(WIDTHS)):
            names += _block_names(level)
            if level < 2:
                names += _down_names(level)
            elif level < 4:
                names += _up_names(level - 2)
            if level < 4:
                names += under(f"resblock{level}", f"refine.{level}", ("conv0", "conv1"), ("conv1", "conv2"))
        return names


def _block_names(level: int) -> NamePairs:
    attention, mlp = (f"s2block{level}.layers.0.{part}.fn" for part in (0, 1))
    maps = ((f"fn.{name}", name) for name in ("sa1", "sa2", "se1", "se2"))
    names = under(attention, f"fuse.{level}", ("norm", "norm1"), *maps, ("fn.to_out.0", "out"))
    return names + under(mlp, f"fuse.{level}", ("norm", "norm2"), ("fn.net.0", "linear1"), ("fn.net.3", "linear2"))


def _down_names(i: int) -> NamePairs:
    idle = (("maxpool_conv.1", "idle1"), ("maxpool_conv.2", "idle2"))
    used = (("conv.0", "halve"), ("conv.2", "widen"), ("conv.3", "depthwise"))
    return under(f"down{i}", f"down.{i}", *idle, *used)


def _up_names(i: int) -> NamePairs:
    idle = (("up0.0", "idle1"), ("up0.2", "idle2"), ("up0.3", "idle3"))
    return under(f"up{i}", f"up.{i}", *idle, ("up1.0", "enlarge"), ("conv", "conv"))


class SpatialSpectralBlock(nn.Module):
    """Spatial and spectral self-attention, multiplied, then two linear maps; each beside a shortcut.

    The paper's S2Block: x + Wo(softmax(Ya Yb^T / 4) Xa * Ya softmax(Xa^T Xb / (4 n / 16))) with linear maps Ya, Yb of
    the spatial and Xa, Xb of the spectral image after a common layer norm, in heads of 16 channels. The image of n
    pixels is a list of n tokens, row by row.

    Args:
        width: Channels C of both images.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.sa1 = nn.Linear(width, width, bias=False)
        self.sa2 = nn.Linear(width, width, bias=False)
        self.se1 = nn.Linear(width, width, bias=False)
        self.se2 = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, width // 2)
        self.linear2 = nn.Linear(width // 2, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Fuse ``x`` [B, C, H, W] with the detail of ``y`` [B, C, H, W] to [B, C, H, W]."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self._attend(self.norm1(tokens), self.norm1(y.flatten(2).transpose(1, 2)))
        tokens = tokens + self.linear2(F.leaky_relu(self.linear1(self.norm2(tokens))))
        return cast(Tensor, tokens.transpose(1, 2).unflatten(2, x.shape[2:]))

    def _attend(self, x: Tensor, y: Tensor) -> Tensor:
        """Map two lists of tokens [B, n, C] to one."""
        ya, yb, xa, xb = (_split(part) for part in (self.sa1(y), self.sa2(y), self.se1(x), self.se2(x)))
        joined = spatial_attention(ya, yb, xa) * spectral_attention(xa, xb, ya)
        return cast(Tensor, self.out(joined.transpose(1, 2).flatten(2)))


def spatial_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query key^T / 4) value of [B, heads, n, 16], in memory that is linear in n."""
    return F.scaled_dot_product_attention(query, key, value, scale=HEAD_WIDTH**-0.5)


def spectral_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return value softmax(query^T key / (4 n / 16)) of [B, heads, n, 16]: channels attend to channels."""
    scale = HEAD_WIDTH**-0.5 / (query.shape[-2] / HEAD_WIDTH)
    weights = (query.transpose(-2, -1) @ key * scale).softmax(dim=-1)
    return cast(Tensor, value @ weights)


def _split(tokens: Tensor) -> Tensor:
    """Split [B, n, C] into heads [B, C / 16, n, 16]."""
    batch, pixels, _ = tokens.shape
    return tokens.reshape(batch, pixels, -1, HEAD_WIDTH).transpose(1, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions through half the width, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(width // 2, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        return cast(Tensor, x + self.conv2(F.leaky_relu(self.conv1(x))))


class Down(nn.Module):
    """Downsampling that halves the size and doubles the width.

    Args:
        width: Channels in.
        published: True adds the published layers that are never used.
    """

    def __init__(self, width: int, published: bool) -> None:
        super().__init__()
        self.halve = nn.Conv2d(width, width, 2, stride=2)
        self.widen = nn.Conv2d(width, 2 * width, 1)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.idle1 = nn.Conv2d(width, 2 * width, 1) if published else None
        self.idle2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width) if published else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, 2 C, H / 2, W / 2]."""
        return F.leaky_relu(self.depthwise(self.widen(F.leaky_relu(self.halve(x)))))


class Up(nn.Module):
    """Upsampling that doubles the size, halves the width and adds the skip connection.

    Args:
        width: Channels in.
        published: True adds the published layers that are never used.
    """

    def __init__(self, width: int, published: bool) -> None:
        super().__init__()
        half = width // 2
        self.enlarge = nn.ConvTranspose2d(width, half, 2, stride=2)
        self.conv = nn.Conv2d(half, half, 3, padding=1)
        self.idle1 = nn.ConvTranspose2d(width, width, 2, stride=2) if published else None
        self.idle2 = nn.Conv2d(width, half, 1) if published else None
        self.idle3 = nn.Conv2d(half, half, 3, padding=1, groups=half) if published else None

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map [B, C, H, W] and skip [B, C / 2, 2 H, 2 W] to [B, C / 2, 2 H, 2 W]."""
        return F.leaky_relu(self.conv(F.leaky_relu(self.enlarge(x)) + skip))
