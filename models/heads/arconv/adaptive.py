"""Adaptive rectangular convolution: the extent of the kernel in pixels is learned at each pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.contracts import NamePairs, Size, under
from models.heads.arconv.ranks import RankBatchNorm2d, mean_over_ranks

KERNELS: tuple[Size, ...] = ((3, 3), (3, 5), (5, 3), (3, 7), (7, 3), (5, 5), (5, 7), (7, 5), (7, 7))
"""Rows and columns of the taps of each stored convolution."""

CONTEXT_GAIN = 100
"""Factor on the input of the branches that predict heights and widths."""

DAMPING = 0.1
"""Factor on the gradient at each of a branch's first two layers."""


class AdaptiveConv(nn.Module):
    """A convolution C -> C whose taps spread over a rectangle of learned height and width at each pixel.

    Wang et al., "Adaptive Rectangular Convolution for Remote Sensing Pansharpening", CVPR 2025 (arXiv 2503.00467),
    section 3: heights h and widths w in (1, 9) px at each pixel; the numbers of taps, from their means; the samples,
    with a distance of (h / rows, w / columns) between taps; their convolution; and an affine map of it, m * conv + b.

    The number of taps is one decision for all pixels and all ranks. Training decides again in each forward pass until
    ``frozen``, and keeps the last decision in the buffer ``reserved_NXY``. Evaluation uses the buffer, so that no
    image's result depends on its batch, unless ``follows_batch`` is set: the published form also decides in evaluation.

    Args:
        channels: C.
        dropout: Rate at which whole channels are dropped, 0 for none.
        follows_batch: True decides the number of taps by the batch in evaluation mode too.
    """

    reserved_NXY: Tensor

    def __init__(self, channels: int, dropout: float, follows_batch: bool) -> None:
        super().__init__()
        self.frozen = False
        self.follows_batch = follows_batch
        # A copy of the buffer on the host, so that a forward pass need not wait for a GPU.
        self._kernel = KERNELS[0]
        # Not a parameter, as in the published form: optimizers and ZeRO would use it.
        self.register_buffer("reserved_NXY", torch.tensor(self._kernel, dtype=torch.int32))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, kernel, stride=kernel) for kernel in KERNELS)
        self.scale = _affine_branch(channels, dropout)
        self.shift = _affine_branch(channels, dropout)
        self.context = Branch(*_extent_layers(channels, channels, 3), nn.LeakyReLU())
        self.height = Branch(*_extent_layers(channels, 1, 1))
        self.width = Branch(*_extent_layers(channels, 1, 1))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        context = self.context(CONTEXT_GAIN * x)
        height, width = _extent(self.height(context)), _extent(self.width(context))
        kernel = self._choose(height, width)
        taps = self.dropout(sample_taps(x, height, width, kernel))
        result = self.convs[KERNELS.index(kernel)](taps)
        return cast(Tensor, result * torch.tanh(self.scale(x)) + self.shift(x))

    @torch.no_grad()
    def _choose(self, height: Tensor, width: Tensor) -> Size:
        """Return rows and columns of taps for a batch; all ranks call it together in training."""
        decides = not self.frozen if self.training else self.follows_batch
        if not decides or height.is_meta:  # without values, nothing can be decided from them
            return self._kernel
        means = torch.stack([height.double().mean(), width.double().mean()])
        if not self.training:
            return _kernel(means)
        kernel = _kernel(mean_over_ranks(means))
        if kernel != self._kernel:
            self._kernel = kernel
            self.reserved_NXY.copy_(torch.tensor(kernel))
        return kernel

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        name = f"{prefix}reserved_NXY"
        if name in state_dict and not state_dict[name].is_meta:
            kernel = tuple(state_dict[name].tolist())
            if kernel not in KERNELS:
                raise ValueError(f"{name} = {list(kernel)} is not a kernel size: both must be 3, 5 or 7")
            self._kernel = kernel
        super()._load_from_state_dict(state_dict, prefix, *others)


class Branch(nn.Sequential):
    """Sequence of layers; in training the gradients at the first and the second layer are damped.

    The second damping affects the first layer's weights; both together affect the layers before the branch.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] through all layers."""
        for number, layer in enumerate(self):
            x = layer(_damp(x) if self.training and number < 2 else x)
        return x


class _Damp(torch.autograd.Function):
    """Identity in the forward pass, the gradient times ``DAMPING`` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return DAMPING * gradients[0]


def _damp(x: Tensor) -> Tensor:
    return cast(Tensor, _Damp.apply(x))  # type: ignore[no-untyped-call]


def sample_taps(x: Tensor, height: Tensor, width: Tensor, kernel: Size) -> Tensor:
    """Sample an image at the taps of each pixel, bilinear between pixels, zero outside.

    Tap (i, j) of pixel (r, c) lies at row r + height (i - (rows - 1) / 2) / rows, and its column likewise, with the
    height and the width at that pixel.

    Args:
        x: Image [B, C, H, W].
        height: Extent along the rows [B, 1, H, W], px.
        width: Extent along the columns [B, 1, H, W], px.
        kernel: Numbers of rows and columns of taps.

    Returns:
        [B, C, rows H, columns W]: each pixel replaced by its taps.
    """
    vertical = _positions(height, kernel[0], axis=1)  # [B, H, rows, W]
    horizontal = _positions(width, kernel[1], axis=2)  # [B, H, W, columns]
    batch, _, rows, columns = x.shape
    shape = (batch, rows, kernel[0], columns, kernel[1])
    grid = torch.stack([horizontal.unsqueeze(2).expand(shape), vertical.unsqueeze(4).expand(shape)], dim=-1)
    grid = grid.reshape(batch, rows * kernel[0], columns * kernel[1], 2)
    return F.grid_sample(x.to(grid.dtype), grid, padding_mode="zeros", align_corners=False).to(x.dtype)


def _positions(extent: Tensor, taps: int, axis: int) -> Tensor:
    """Return the positions of each pixel's taps along an axis of [B, H, W], with a new axis for the taps behind it.

    -1 and 1 are the outer edges of the image. (Published: the centres of its outer pixels, which gives the same point,
    except in an image of one pixel, where every point would be its centre.)
    """
    size = extent.shape[axis + 1]
    steps = torch.arange(taps, device=extent.device, dtype=extent.dtype) - (taps - 1) / 2
    pixels = torch.arange(size, device=extent.device, dtype=extent.dtype)
    along = [1, 1, 1, 1]
    along[axis] = size
    across = [1, 1, 1, 1]
    across[axis + 1] = taps
    position = pixels.view(along) + extent.squeeze(1).unsqueeze(axis + 1) / taps * steps.view(across)
    return (2 * position + 1) / size - 1


def _extent(x: Tensor) -> Tensor:
    """Map any number to an extent in (1, 9) px, in float32 or wider: bfloat16 has no fractions of a distant pixel."""
    return 1 + 8 * torch.sigmoid(x.to(torch.promote_types(x.dtype, torch.float32)))


def _kernel(means: Tensor) -> Size:
    """Return the odd numbers of 3 to 7 at or below the mean height and width."""
    height, width = means.tolist()
    return 3 + 2 * (height >= 5) + 2 * (height >= 7), 3 + 2 * (width >= 5) + 2 * (width >= 7)


def _affine_branch(channels: int, dropout: float) -> Branch:
    def conv() -> nn.Conv2d:
        return nn.Conv2d(channels, channels, 3, padding=1)

    def between() -> tuple[nn.Module, nn.Module]:
        return nn.LeakyReLU(), nn.Dropout2d(dropout)

    return Branch(conv(), *between(), conv(), *between(), conv())


def _extent_layers(inputs: int, outputs: int, second_kernel: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, 3, padding=1),
        RankBatchNorm2d(outputs),
        nn.LeakyReLU(),
        nn.Identity(),  # a dropout of rate 0 in the model that the names come from
        nn.Conv2d(outputs, outputs, second_kernel, padding=second_kernel // 2),
        RankBatchNorm2d(outputs),
    )


def adaptive_names(block: str) -> NamePairs:
    """Pair the published names of an :class:`AdaptiveConv` with ours; ``block`` is the name of both."""
    same = (("reserved_NXY", "reserved_NXY"), ("convs", "convs"))
    branches = (("m_conv", "scale"), ("b_conv", "shift"), ("p_conv", "context"), ("l_conv", "height"))
    return under(block, block, *same, *branches, ("w_conv", "width"))
