"""Building blocks shared by several models."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.contracts import NamePairs, Size, under


def reflect_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size and mirrors the image at its border."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect")


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each followed by a PReLU and dropout.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        dropout: Rate of both dropouts, 0 for none.
    """

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = reflect_conv(inputs, outputs)
        self.act1 = nn.PReLU()
        self.conv2 = reflect_conv(outputs, outputs)
        self.act2 = nn.PReLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, h, w] to [N, outputs, h, w]."""
        x = self.dropout(self.act1(self.conv1(x)))
        return cast(Tensor, self.dropout(self.act2(self.conv2(x))))


def double_conv_names(published: str, own: str) -> NamePairs:
    """Pair the published names of a :class:`DoubleConv` with ours."""
    return under(f"{published}.doubleconv2d", own, ("0", "conv1"), ("2", "act1"), ("4", "conv2"), ("6", "act2"))


def check_reflectable(lr: Size, encoder: str) -> None:
    """Raise ValueError if revisits of size ``lr`` are too small for a reflect padding of 1 pixel."""
    if min(lr) < 2:
        raise ValueError(f"{encoder} needs revisits of at least 2 x 2 px, and these are {lr[0]} x {lr[1]}")


def check_published_bands(config: ModelConfig, model: str) -> None:
    """Raise ValueError if the published form of a model is requested for another number of bands than 3."""
    if config.published and config.bands != 3:
        raise ValueError(
            f"the published {model} is written for 3 bands and cannot take bands = {config.bands}; "
            f"with published = false it takes any number"
        )


def check_published_grid(config: ModelConfig, pan: Size, grid: int, model: str) -> None:
    """Raise ValueError if the published form of a model is requested for sides that ``grid`` does not divide."""
    if config.published and (pan[0] % grid or pan[1] % grid):
        raise ValueError(
            f"the published {model} halves its images twice and cannot take a PAN of {pan[0]} x {pan[1]} px, whose "
            f"sides {grid} does not divide; with published = false it takes any size"
        )


def bilinear(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [B, C, h, w] to ``size`` (H, W): half-pixel centres, edges clamped, no antialiasing."""
    if tuple(image.shape[-2:]) == size:
        return image
    # An exported program runs without this package, and so without the operator.
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return cast(Tensor, _bilinear(image, *size)) if compiling else _interpolate(image, *size)


def _interpolate(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image, size=(height, width), mode="bilinear", align_corners=False)


@torch.library.custom_op("satfusion::bilinear", mutates_args=())
def _bilinear(image: Tensor, height: int, width: int) -> Tensor:
    """Resize as one operator in a compiled graph too.

    PyTorch 2.13 decomposes it there. The gradient of the parts is an ``index_put``, which its CPU code ran after the
    operations that read the result: all gradients before a blur became zero (github.com/pytorch/pytorch/issues/185509
    is a similar bug).
    """
    return _interpolate(image, height, width)


@_bilinear.register_fake
def _(image: Tensor, height: int, width: int) -> Tensor:
    return _interpolate(image, height, width)


def _keep_size(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    ctx.size = inputs[0].shape


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    backward = torch.ops.aten.upsample_bilinear2d_backward
    return backward(grad, grad.shape[-2:], ctx.size, False, None, None), None, None


_bilinear.register_autograd(_differentiate, setup_context=_keep_size)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [B, C, h, w] to ``size`` (H, W), blurring first along the axes that shrink."""
    for axis, target in zip((-2, -1), size, strict=True):
        factor = image.shape[axis] / target
        if factor > 1:
            image = _blur(image, axis, max((factor - 1) / 2, 0.001))
    return bilinear(image, size)


def _blur(image: Tensor, axis: int, sigma: float) -> Tensor:
    """Convolve one axis with a normalised Gaussian of ``sigma`` pixels, mirrored at the border."""
    taps = max(int(4 * sigma), 3) | 1
    half = taps // 2
    if image.shape[axis] <= half:
        raise ValueError(f"an image of {image.shape[axis]} px is too small to be shrunk by a {taps}-tap blur")
    distance = torch.arange(-half, half + 1, device=image.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(image.dtype)
    channels = image.shape[1]
    shape, padding = ((taps, 1), (0, 0, half, half)) if axis == -2 else ((1, taps), (half, half, 0, 0))
    weight = kernel.view(1, 1, *shape).expand(channels, 1, *shape)
    return F.conv2d(F.pad(image, padding, mode="reflect"), weight, groups=channels)
