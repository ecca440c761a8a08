"""TR-MISR: a transformer over the revisits at every pixel."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.contracts import Encoder, NamePairs, Size, under

WIDTH = 64
HEADS = 8
MLP_WIDTH = 128
LAYERS = 6
RESIDUAL_BLOCKS = 2
PAN_FEATURES = 3
"""Channels of the PAN features from which the guided encoder makes its tokens."""

DROPOUT = 0.1
PUBLISHED_SIZE = (50, 50)

MAX_SEQUENCES = 1 << 13
"""Sequences, one per pixel, that the transformer processes together. Flash attention on CUDA refuses more than 65,535
(github.com/pytorch/pytorch/issues/146704), and its backward pass pads the queries of each to 128 x 32 floats per head:
1 GiB for these. On CPU fewer at a time are faster, because their tensors are then not returned to the system between
calls."""


class TRNet(Encoder):
    """Encoder of each revisit alone, and a learned token that gathers the revisits' content pixel by pixel.

    An, Zhang, Zhang, Zhang, Huang, "TR-MISR: Multiimage Super-Resolution Based on Feature Fusion With Transformers",
    IEEE JSTARS 15, 2022. Revisits carry no positional code, so their order and number are free. The published form
    requires 50 x 50 px and holds the parts that make a token of PAN, which only the guided encoder uses.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.fusion = RevisitFusion(config.bands, config.hidden, dropout_rate(config))
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pan_token = PanToken() if config.published else None

    @classmethod
    def check_sizes(cls, config: ModelConfig, lr: Size, pan: Size) -> None:
        """Refuse the sizes that the published model cannot take."""
        check_published_size(config, lr, "TR-MISR")

    def forward(self, lr: Tensor, pan: Tensor) -> Tensor:
        """Map lr [B, R, C, h, w] to features [B, D, h, w]; ``pan`` is not used."""
        return cast(Tensor, self.fusion(lr, self.token))

    def published_names(self) -> NamePairs:
        """Return the published names."""
        return published_names()


class RevisitFusion(nn.Module):
    """TR-MISR for any token: encoder, transformer, decoder.

    Args:
        channels: Channels of a revisit.
        hidden: Channels of the result, D.
        dropout: Rate of all dropouts, 0 for none.
    """

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.encode = RevisitEncoder(channels)
        self.layers = nn.ModuleList(TransformerLayer(dropout) for _ in range(LAYERS))
        self.conv = nn.Conv2d(WIDTH, hidden, 3, padding=1)
        self.act = nn.PReLU()

    def forward(self, lr: Tensor, token: Tensor) -> Tensor:
        """Fuse the revisits.

        Args:
            lr: Revisits [B, R, channels, h, w].
            token: Initial token of each pixel, [B h w, 1, 64], or [1, 1, 64] for all pixels.

        Returns:
            Features [B, D, h, w].
        """
        batch, revisits, _, height, width = lr.shape
        x = self.encode(lr.flatten(0, 1)).unflatten(0, (batch, revisits))
        x = x.permute(0, 3, 4, 1, 2).flatten(0, 2)
        x = torch.cat([token.expand(len(x), -1, -1), x], dim=1)
        x = torch.cat([self.gather(part) for part in torch.split(x, MAX_SEQUENCES)])
        x = x.reshape(batch, height, width, WIDTH).permute(0, 3, 1, 2)
        return cast(Tensor, self.act(self.conv(x)))

    def gather(self, x: Tensor) -> Tensor:
        """Map sequences [N, 1 + R, 64] to their tokens after the transformer, [N, 1, 64]."""
        for layer in self.layers[:-1]:
            x = layer(x)
        # Only the token of the last layer is used, so only the token is computed.
        return cast(Tensor, self.layers[-1](x, kept=1))


class RevisitEncoder(nn.Module):
    """Convolutions on each revisit alone, around residual blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.act = nn.PReLU()
        self.blocks = nn.Sequential(*(ResidualBlock() for _ in range(RESIDUAL_BLOCKS)))
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, channels, h, w] to [N, 64, h, w]."""
        return cast(Tensor, self.conv2(self.blocks(self.act(self.conv1(x)))))


class ResidualBlock(nn.Module):
    """Two convolutions, each followed by a PReLU, beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.act1 = nn.PReLU()
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.act2 = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 64, h, w] to the same shape."""
        return cast(Tensor, x + self.act2(self.conv2(self.act1(self.conv1(x)))))


class TransformerLayer(nn.Module):
    """x + Attention(LN x), then x + MLP(LN x)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = Attention(dropout)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.linear1 = nn.Linear(WIDTH, MLP_WIDTH)
        self.linear2 = nn.Linear(MLP_WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, kept: int | None = None) -> Tensor:
        """Map [N, T, 64] to the first ``kept`` of T positions, or to all; each position attends to all T."""
        x = x[:, :kept] + self.attention(self.norm1(x), kept)
        inner = self.dropout(F.gelu(self.linear1(self.norm2(x))))
        return cast(Tensor, x + self.dropout(self.linear2(inner)))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(64)) v in 8 heads of 8: the scale is that of the whole width, not of a head."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, kept: int | None = None) -> Tensor:
        """Map [N, T, 64] to the attention result of the first ``kept`` positions, or of all."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q[:, :, :kept], k, v, scale=WIDTH**-0.5)
        return cast(Tensor, self.dropout(self.out(found.transpose(1, 2).flatten(2))))


class PanToken(nn.Module):
    """Map from PAN features at each pixel to the token that gathers its revisits."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(PAN_FEATURES, WIDTH, 1)
        self.norm = nn.LayerNorm(WIDTH)
        self.linear1 = nn.Linear(WIDTH, WIDTH)
        self.linear2 = nn.Linear(WIDTH, WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, 3, h, w] to tokens [B h w, 1, 64], row after row."""
        x = self.project(features).permute(0, 2, 3, 1).reshape(-1, 1, WIDTH)
        return cast(Tensor, self.linear2(F.gelu(self.linear1(self.norm(x)))))


def dropout_rate(config: ModelConfig) -> float:
    """Return the rate of all dropouts of TR-MISR."""
    return DROPOUT if config.dropout == "published" else 0.0


def check_published_size(config: ModelConfig, lr: Size, encoder: str) -> None:
    """Raise ValueError if the published model cannot take revisits of size ``lr``."""
    if config.published and lr != PUBLISHED_SIZE:
        raise ValueError(
            f"the published {encoder} reshapes its result to 50 x 50 px and cannot take revisits of "
            f"{lr[0]} x {lr[1]}; with published = false it takes any size"
        )


def published_names() -> NamePairs:
    """Return the published names of a :class:`RevisitFusion` ``fusion``, a ``token`` and a ``pan_token``."""
    encode, superres = "blockMISR.encode", "blockMISR.superres"
    names = under(f"{encode}.init_layer", "fusion.encode", ("0", "conv1"), ("1", "act"))
    for block in range(RESIDUAL_BLOCKS):
        entries = (("0", "conv1"), ("1", "act1"), ("2", "conv2"), ("3", "act2"))
        names += under(f"{encode}.res_layers.{block}.block", f"fusion.encode.blocks.{block}", *entries)
    names += ((f"{encode}.final.0", "fusion.encode.conv2"), (f"{superres}.orignal_token", "token"))
    entries = (("pan_proj", "project"), ("pan_ln", "norm"), ("pan_mlp.0", "linear1"), ("pan_mlp.2", "linear2"))
    names += under(superres, "pan_token", *entries)
    for layer in range(LAYERS):
        attention = (("norm", "norm1"), ("fn.to_qkv", "attention.qkv"), ("fn.to_out.0", "attention.out"))
        mlp = (("norm", "norm2"), ("fn.net.0", "linear1"), ("fn.net.3", "linear2"))
        theirs, ours = f"{superres}.transformer.layers.{layer}", f"fusion.layers.{layer}"
        names += under(f"{theirs}.0.fn", ours, *attention) + under(f"{theirs}.1.fn", ours, *mlp)
    return names + under("blockMISR.decode.final", "fusion", ("0", "conv"), ("1", "act"))
