"""INNformer: local and patch-matching features, mixed by invertible blocks."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import ModelConfig
from models.contracts import Head, NamePairs, Size

WIDTH = 8
"""Channels of each of the two images, and of each half in the invertible blocks."""

BLOCKS = 3
WINDOW, STRIDE, MARGIN = 24, 8, 8
"""Side, stride and padding of the matched windows, pixels."""

SMALLEST = WINDOW - 2 * MARGIN
"""Minimum side of an image that holds a window, pixels."""

CHUNK = 32
"""Windows matched at a time; their similarities take 42 MB."""

SCALE_LIMIT = 0.8
"""Bound of the logarithm of the factor in an affine coupling."""


class INNformer(Head):
    """Local fusion and a patch transformer, then three invertible blocks.

    Zhou et al., "Pan-Sharpening with Customized Transformer and Invertible Neural Network", AAAI 2022, and
    "Effective Pan-Sharpening With Transformer and Invertible Neural Network", IEEE TGRS 60, 2022.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.ms_conv = nn.Conv2d(config.bands, WIDTH, 3, padding=1)
        self.pan_conv = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.local = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)
        self.match = PatchTransformer()
        self.blocks = nn.ModuleList(InvertibleBlock() for _ in range(BLOCKS))
        self.fuse = nn.Conv2d(4 * WIDTH, 2 * WIDTH, 1)
        self.refine = Refinement(config.bands)
        for module in (*self.blocks.modules(), self.fuse):
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(cast(Tensor, module.bias))

    @classmethod
    def check_sizes(cls, config: ModelConfig, lr: Size, pan: Size) -> None:
        """Refuse images too small for a single window."""
        if min(pan) < SMALLEST:
            raise ValueError(
                f"INNformer matches windows of {WINDOW} px that reach {MARGIN} px over the border, so it needs a PAN "
                f"of at least {SMALLEST} x {SMALLEST} px, and this one is {pan[0]} x {pan[1]}"
            )

    def forward(self, ms: Tensor, pan: Tensor) -> Tensor:
        """Map ms [B, C, H, W] and pan [B, 1, H, W] to [B, C, H, W]."""
        spectral, spatial = self.ms_conv(ms), self.pan_conv(pan)
        local = self.local(torch.cat([spectral, spatial], dim=1))
        start = torch.cat([local, self.match(spectral, spatial)], dim=1)
        x = start
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.refine(self.fuse(torch.cat([start, x], dim=1))))

    def published_names(self) -> NamePairs:
        """Return the published names."""
        names: NamePairs = (("conv_process.convms", "ms_conv"), ("conv_process.convpan", "pan_conv"))
        names += (("conv_fusion.conv", "local"),)
        names += tuple((f"transform_fusion.fuse.conv_trans.{2 * i}", f"match.conv{i + 1}") for i in (0, 1))
        parts = (("F", "shift1"), ("G", "shift2"), ("H", "scale"), ("invconv", "mix"))
        for i in range(BLOCKS):
            names += tuple((f"extract.operations.{i}.{theirs}", f"blocks.{i}.{ours}") for theirs, ours in parts)
        names += (("extract.fuse", "fuse"), ("refine.conv_in", "refine.conv_in"))
        names += (("refine.process.0.conv_du.0", "refine.squeeze"), ("refine.process.0.conv_du.2", "refine.excite"))
        names += (("refine.process.0.process.0", "refine.conv1"), ("refine.process.0.process.2", "refine.conv2"))
        return (*names, ("refine.conv_last", "refine.conv_last"))


class PatchTransformer(nn.Module):
    """Hard attention: every 3 x 3 patch of one image takes the most similar one of the other.

    The customized transformer of AAAI 2022. With the 3 x 3 patches q_i of the query and k_j of the key as unit vectors
    r_ij = q_i . k_j, s_j = max_i r_ij, and T is the sum of the query's overlapping patches argmax_i r_ij; the result is
    key + s N([T; key]) with two convolutions N. Patches are sought inside a window of 24 x 24 px.

    As published, in both forms, the unfolded windows [B, 8 576, L] are read in memory as [B L, 8, 24, 24]. So a
    "window" below holds values from many places, and weights are trained for that order. Samples never mix.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, key: Tensor, query: Tensor) -> Tensor:
        """Map key and query [B, 8, H, W] to [B, 8, H, W], in which overlapping windows are summed."""
        batch, size = len(key), key.shape[2:]
        keys, queries = _windows(key), _windows(query)
        chunks = zip(torch.split(queries, CHUNK), torch.split(keys, CHUNK), strict=True)
        found = [transfer(*chunk) for chunk in chunks]
        texture, similarity = (torch.cat(parts) for parts in zip(*found, strict=True))
        detail = self.conv2(F.relu(self.conv1(torch.cat([texture, keys], dim=1))))
        out = (keys + similarity * detail).reshape(batch, WIDTH * WINDOW**2, -1)
        return F.fold(out, size, WINDOW, padding=MARGIN, stride=STRIDE)


def _windows(image: Tensor) -> Tensor:
    """Unfold [B, 8, H, W] to L windows a sample and read the memory as [B L, 8, 24, 24]."""
    return F.unfold(image, WINDOW, padding=MARGIN, stride=STRIDE).reshape(-1, WIDTH, WINDOW, WINDOW)


def transfer(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Replace each patch of ``key`` by the patch of ``query`` whose cosine to it is largest.

    The search has no gradient and keeps nothing. The patches found have a gradient; they are gathered again in the
    backward pass instead of kept, because they are nine times as large as the windows.

    Args:
        query: Windows [P, 8, 24, 24].
        key: Windows of the same shape.

    Returns:
        The sum of the overlapping patches of ``query``, divided by 9, [P, 8, 24, 24]; the cosine of each, [P, 1, 24,
        24].
    """
    index = nearest_patch(query, key)
    return cast(
        tuple[Tensor, Tensor], checkpoint(_gather, query, key, index, use_reentrant=False, preserve_rng_state=False)
    )


@torch.no_grad()
def nearest_patch(query: Tensor, key: Tensor) -> Tensor:
    """Return for each patch of ``key`` the number of its nearest in ``query`` [P, 576]; the first wins a tie.

    In float32 or wider, under autocast too: cosines that bfloat16 cannot distinguish would all select the first.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        keys, queries = _unit(_patches(key.to(wide))), _unit(_patches(query.to(wide)))
        return torch.bmm(keys.transpose(1, 2), queries).argmax(dim=2)


def _gather(query: Tensor, key: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    keys = _patches(key)
    chosen = _patches(query).gather(2, index.unsqueeze(1).expand_as(keys))
    cosine = (_unit(chosen) * _unit(keys)).sum(dim=1)
    size = key.shape[2:]
    return F.fold(chosen, size, 3, padding=1) / 9, cosine.reshape(-1, 1, *size)


def _patches(windows: Tensor) -> Tensor:
    """Unfold [P, 8, 24, 24] to the 3 x 3 patch around each pixel, [P, 72, 576]."""
    return F.unfold(windows, 3, padding=1)


def _unit(patches: Tensor) -> Tensor:
    return F.normalize(patches, dim=1)


class InvertibleBlock(nn.Module):
    """Mix of all channels, then an affine coupling of each half by the other.

    The 1x1 convolution is that of Kingma and Dhariwal, "Glow", NeurIPS 2018.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shift1 = Subnet()
        self.shift2 = Subnet()
        self.scale = Subnet()
        self.mix = InvertibleConv(2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 16, H, W] to the same shape."""
        first, second = self.mix(x).chunk(2, dim=1)
        first = first + self.shift1(second)
        second = second * torch.exp(self.log_scale(first)) + self.shift2(first)
        return torch.cat([first, second], dim=1)

    def log_scale(self, first: Tensor) -> Tensor:
        """Return the logarithm of the coupling's factor, within (-0.8, 0.8)."""
        return SCALE_LIMIT * (2 * torch.sigmoid(self.scale(first)) - 1)


class InvertibleConv(nn.Module):
    """A 1x1 convolution with W = P (L + I) (U + diag(sign exp(log_s))), L and U strictly triangular.

    Glow, section 3.2, equation 10. It begins as a random orthogonal matrix.
    """

    p: Tensor
    sign_s: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        p, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(width, width)).Q)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower)
        self.log_s = nn.Parameter(diagonal.abs().log())
        self.upper = nn.Parameter(upper.triu(1))
        self.register_buffer("p", p)
        self.register_buffer("sign_s", diagonal.sign())

    def weight(self) -> Tensor:
        """Return W [width, width]."""
        lower = self.lower.tril(-1) + torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        upper = self.upper.triu(1) + torch.diag(self.sign_s * self.log_s.exp())
        return self.p @ lower @ upper

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, width, H, W] to the same shape."""
        return F.conv2d(x, self.weight()[:, :, None, None])


class Subnet(nn.Module):
    """Network that a coupling applies to the half it does not change: to twice its width and back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = HalfNormBlock(WIDTH, 2 * WIDTH)
        self.conv2 = HalfNormBlock(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 8, H, W] to the same shape."""
        return F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.2)), 0.2)


class HalfNormBlock(nn.Module):
    """Two 3x3 convolutions, with an instance norm of half the channels between them, beside a 1x1 shortcut.

    Chen et al., "HINet: Half Instance Normalization Network for Image Restoration", CVPR workshops 2021.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.identity = nn.Conv2d(inputs, outputs, 1)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm = nn.InstanceNorm2d(outputs // 2, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H, W]."""
        first, second = self.conv_1(x).chunk(2, dim=1)
        y = F.leaky_relu(torch.cat([self.norm(first), second], dim=1), 0.1)
        return cast(Tensor, F.leaky_relu(self.conv_2(y), 0.1) + self.identity(x))


class Refinement(nn.Module):
    """Two convolutions; between them one number is added to each channel, from the channel's mean and a gate."""

    def __init__(self, bands: int) -> None:
        super().__init__()
        width = 2 * WIDTH
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.squeeze = nn.Conv2d(width, width // 4, 1)
        self.excite = nn.Conv2d(width // 4, width, 1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, bands, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 16, H, W] to [B, C, H, W]."""
        x = self.conv_in(x)
        mean = self.conv2(F.relu(self.conv1(x))).mean(dim=(2, 3), keepdim=True)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))
        return cast(Tensor, self.conv_last(x + gate * mean))
