"""Pan-Mamba: state space models over the pixels; the channels of both images are swapped, then crossed."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import check_published_bands
from models.config import ModelConfig
from models.contracts import Head, NamePairs, Size, under
from models.heads.pan_mamba.blocks import CrossMamba, Mamba

WIDTH = 32
SQUEEZED = 8
RESIDUAL_BLOCKS = 3
EXTRACTION_BLOCKS = 8
SWAPS = 2
CROSSINGS = 5
SLOPE = 0.2
PUBLISHED_SIZE = (156, 156)


class PanMamba(Head):
    """Features of both images, eight Mamba blocks on each, two channel swaps and five cross blocks.

    He et al., "Pan-Mamba: Effective Pan-Sharpening with State Space Model", arXiv 2402.12192; HinRes blocks: Chen et
    al., "HINet: Half Instance Normalization Network for Image Restoration", CVPRW 2021. Tokens are pixels, row after
    row. The published form requires 3 bands and 156 x 156 px and holds unused convolutions and norms.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        published = config.published
        self.pan_features = _features(1, published)
        self.ms_features = _features(config.bands, published)
        self.ms_fusion = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)
        self.pan_fusion = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)
        self.ms_embed = nn.Conv2d(WIDTH, WIDTH, 1)
        self.ms_embed_norm = nn.Parameter(torch.ones(WIDTH)) if published else None
        self.pan_embed = nn.Conv2d(WIDTH, WIDTH, 1)
        self.pan_embed_norm = nn.Parameter(torch.ones(WIDTH)) if published else None
        self.crossings = nn.ModuleList(CrossBlock() for _ in range(CROSSINGS))
        self.pan_extraction = nn.ModuleList(MambaBlock() for _ in range(EXTRACTION_BLOCKS))
        self.ms_extraction = nn.ModuleList(MambaBlock() for _ in range(EXTRACTION_BLOCKS))
        self.swaps = nn.ModuleList(SwapBlock() for _ in range(SWAPS))
        self.refine = Refine(config.bands)

    @classmethod
    def check_config(cls, config: ModelConfig) -> None:
        """Refuse bands that the published model cannot take."""
        check_published_bands(config, "Pan-Mamba")

    @classmethod
    def check_sizes(cls, config: ModelConfig, lr: Size, pan: Size) -> None:
        """Refuse sizes that the published model cannot take, and a single pixel."""
        if config.published and pan != PUBLISHED_SIZE:
            raise ValueError(
                f"the published Pan-Mamba reshapes its tokens to 156 x 156 px and cannot take a PAN of "
                f"{pan[0]} x {pan[1]}; with published = false it takes any size"
            )
        if pan == (1, 1):
            raise ValueError("Pan-Mamba normalises over the pixels of an image, and a PAN of 1 x 1 has only one")

    def forward(self, ms: Tensor, pan: Tensor) -> Tensor:
        """Map ms [B, C, H, W] and pan [B, 1, H, W] to [B, C, H, W]."""
        size = (ms.shape[-2], ms.shape[-1])
        m = to_tokens(self.ms_embed(self.ms_features(ms)))
        p = to_tokens(self.pan_embed(self.pan_features(pan)))
        m, p = (to_image(tokens, size) for tokens in self._extract(m, p))
        m = self.ms_fusion(torch.cat([m, p], dim=1)) + m
        p = self.pan_fusion(torch.cat([p, m], dim=1)) + p
        m, p = to_tokens(self.ms_embed(m)), to_tokens(self.pan_embed(p))
        residual = torch.zeros_like(m)
        for crossing in self.crossings:
            m, residual = crossing(m, residual, p, size)
        return cast(Tensor, self.refine(to_image(m, size)))

    def _extract(self, m: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Map each image's tokens [B, n, 32] through their Mamba blocks, then swap; the residuals are dropped."""
        m_residual, p_residual = torch.zeros_like(m), torch.zeros_like(p)
        for block in self.ms_extraction:
            m, m_residual = block(m, m_residual)
        for block in self.pan_extraction:
            p, p_residual = block(p, p_residual)
        for swap in self.swaps:
            m, p, m_residual, p_residual = swap(m, p, m_residual, p_residual)
        return m, p

    def published_names(self) -> NamePairs:
        """Return the published names."""
        norms = (("norm1.body", "norm1"), ("norm2.body", "norm2"))
        names: NamePairs = ()
        for image in ("pan", "ms"):
            names += ((f"{image}_encoder.0", f"{image}_features.0"),)
            for i in range(1, 1 + RESIDUAL_BLOCKS):
                entries = (("identity", "idle"), ("conv_1", "conv1"), ("conv_2", "conv2"), ("norm", "norm"))
                names += under(f"{image}_encoder.{i}", f"{image}_features.{i}", *entries)
        names += (("shallow_fusion1", "ms_fusion"), ("shallow_fusion2", "pan_fusion"))
        for image in ("ms", "pan"):
            names += ((f"{image}_to_token.proj", f"{image}_embed"),)
            names += ((f"{image}_to_token.norm.body.weight", f"{image}_embed_norm"),)
        for i in range(CROSSINGS):
            names += under(
                f"deep_fusion{i + 1}", f"crossings.{i}", ("cross_mamba", "mamba"), *norms, ("dwconv", "conv")
            )
        for image in ("pan", "ms"):
            for i in range(EXTRACTION_BLOCKS):
                theirs, ours = f"{image}_feature_extraction.{i}", f"{image}_extraction.{i}"
                names += under(theirs, ours, ("encoder", "mamba"), ("norm.body", "norm"))
        for i in range(SWAPS):
            mambas = (("msencoder", "ms_mamba"), ("panencoder", "pan_mamba"))
            names += under(f"swap_mamba{i + 1}", f"swaps.{i}", *mambas, *norms)
        return names + under("output", "refine", *Refine.PUBLISHED)


class HinRes(nn.Module):
    """Two convolutions beside the identity, half the channels normalised between them.

    Args:
        published: True adds the published 1 x 1 convolution, which is unused.
    """

    def __init__(self, published: bool) -> None:
        super().__init__()
        self.idle = nn.Conv2d(WIDTH, WIDTH, 1) if published else None
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.InstanceNorm2d(WIDTH // 2, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 32, H, W] to the same shape."""
        first, rest = F.leaky_relu(self.conv1(x), SLOPE).chunk(2, dim=1)
        u = torch.cat([self.norm(first), rest], dim=1)
        return x + F.leaky_relu(self.conv2(u), SLOPE)


class MambaBlock(nn.Module):
    """Mamba(LN(r)) with r = x + residual; r is passed on beside the result."""

    def __init__(self) -> None:
        super().__init__()
        self.mamba = Mamba(WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens and residual, both [B, n, 32], to the next ones."""
        residual = x + residual
        return self.mamba(self.norm(residual)), residual


class SwapBlock(nn.Module):
    """Swap of the first half of the channels of both images' tokens, before a Mamba block each."""

    def __init__(self) -> None:
        super().__init__()
        self.ms_mamba = Mamba(WIDTH)
        self.pan_mamba = Mamba(WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)

    def forward(
        self, m: Tensor, p: Tensor, m_residual: Tensor, p_residual: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map tokens and residuals, all [B, n, 32], to the next ones."""
        m_residual, p_residual = m + m_residual, p + p_residual
        m_first, m_rest = self.norm1(m_residual).chunk(2, dim=-1)
        p_first, p_rest = self.norm2(p_residual).chunk(2, dim=-1)
        m = self.ms_mamba(torch.cat([p_first, m_rest], dim=-1))
        p = self.pan_mamba(torch.cat([m_first, p_rest], dim=-1))
        return m, p, m_residual, p_residual


class CrossBlock(nn.Module):
    """Cross block: multispectral tokens take from those of PAN, then a convolution mixes each pixel's neighbours.

    Each norm is applied twice with the same weights, as published.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mamba = CrossMamba(WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, m: Tensor, residual: Tensor, p: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Map tokens ``m`` and their residual, beside those of PAN, all [B, H W, 32], to the next two."""
        residual = m + residual
        tokens = self.norm1(self.norm1(residual))
        extra = self.norm2(self.norm2(p))
        g = to_image(self.mamba(tokens, extra), size)
        return to_tokens(self.conv(g) + g), residual


class Refine(nn.Module):
    """Convolutions with channel attention between the first and the last."""

    PUBLISHED = (
        ("conv_in", "conv_in"),
        ("process.0.conv_du.0", "squeeze"),
        ("process.0.conv_du.2", "excite"),
        ("process.0.process.0", "conv1"),
        ("process.0.process.2", "conv2"),
        ("conv_last", "conv_out"),
    )

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.squeeze = nn.Conv2d(WIDTH, SQUEEZED, 1)
        self.excite = nn.Conv2d(SQUEEZED, WIDTH, 1)
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv_out = nn.Conv2d(WIDTH, bands, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 32, H, W] to [B, C, H, W]."""
        x = self.conv_in(x)
        v = self.conv2(F.relu(self.conv1(x)))
        weight = self.excite(F.relu(self.squeeze(v.mean((2, 3), keepdim=True)))).sigmoid()
        return cast(Tensor, self.conv_out(weight * v + x))


def to_tokens(image: Tensor) -> Tensor:
    """Map [B, 32, H, W] to tokens [B, H W, 32], row after row."""
    return image.flatten(2).mT


def to_image(tokens: Tensor, size: Size) -> Tensor:
    """Undo :func:`to_tokens`."""
    return tokens.mT.reshape(tokens.shape[0], -1, *size)


def _features(channels: int, published: bool) -> nn.Sequential:
    blocks = (HinRes(published) for _ in range(RESIDUAL_BLOCKS))
    return nn.Sequential(nn.Conv2d(channels, WIDTH, 3, padding=1), *blocks)
