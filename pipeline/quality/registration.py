"""Sub-pixel registration of the target to the prediction, by trying 81 shifts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from pipeline.quality.constants import CPU, constant
from sharding.errors import UserError, nearest

Mode = Literal["centred", "published"]
MODES: tuple[Mode, ...] = ("centred", "published")

STEPS = tuple(0.5 * step for step in range(-4, 5))
"""Shifts tried along each axis, in target pixels."""

LOBES = 3
HALF_WIDTH = LOBES + math.ceil(STEPS[-1])
"""Taps of a kernel on either side of its middle; a shifted target loses a border of this width, pixels."""

CENTRE = len(STEPS) ** 2 // 2
"""Index of the zero shift among all pairs of shifts."""

PUBLISHED_CROP = 2
PUBLISHED_OFFSET = 0.001
"""Offset of the published kernel's argument, which avoids 0/0."""


@dataclass(frozen=True)
class Registered:
    """A prediction and the best-fitting shifted target, both without the border lost by shifting."""

    prediction: Tensor
    """[B, C, H - 10, W - 10]; the gradient flows through it."""

    target: Tensor
    """[B, C, H - 10, W - 10]."""

    shift: Tensor
    """(dy, dx) per sample [B, 2], pixels: the shifted target at (r, c) is the target at (r + dy, c + dx)."""

    index: Tensor
    """Number of the shift per sample [B], int64: 9 * index of dy + index of dx."""

    mse_per_shift: Tensor
    """Mean squared error of every shift [81, B]."""


def register(
    prediction: Tensor,
    target: Tensor,
    mode: Mode = "centred",
    preference: float = 0.0,
    mask: Tensor | None = None,
) -> Registered:
    """Shift each sample's target to the least mean squared error to the prediction.

    The search has no gradient and keeps no graph; the chosen pair does. A tie that includes the zero shift, as for a
    flat image, is won by the zero shift, any other tie by the first.

    Args:
        prediction: Images [B, C, H, W], float32 or float64.
        target: Images of the same shape.
        mode: "centred" crops the prediction where the shifted target begins and interpolates by a Lanczos-3 kernel of
            sum 1, so equal images give a zero shift and a zero error. "published" is the formula behind the paper's
            figures: it crops 3 px away from that place, has no such tie rule, and does not normalise its kernel.
        preference: Relative penalty on an error for each squared pixel of its shift's length, so that of two shifts
            that fit about equally the shorter is chosen. A zero error stays zero.
        mask: Mask [B, 1, H - 10, W - 10] of the pixels that are compared (`pipeline.quality.masks`); None takes all.

    Raises:
        UserError: If the images are smaller than 11 px, or ``mode`` is unknown.
        ValueError: If the shapes differ.
    """
    if prediction.shape != target.shape or prediction.ndim != 4:
        raise ValueError(f"cannot register {list(prediction.shape)} to {list(target.shape)}: both are [B, C, H, W]")
    size = min(prediction.shape[-2:])
    if size <= 2 * HALF_WIDTH:
        raise UserError(f"images of {size} px are too small to register: {2 * HALF_WIDTH + 1} px is the least")
    kernels = _kernels(target, mode)
    crop = HALF_WIDTH if mode == "centred" else PUBLISHED_CROP
    height, width = (length - 2 * HALF_WIDTH for length in prediction.shape[-2:])
    cropped = prediction[..., crop : crop + height, crop : crop + width]
    mse = cast(Tensor, _search(cropped.detach(), target.detach(), mode, mask))
    steps = _steps(target.device).to(target.dtype)
    squared_length = (steps.square().unsqueeze(1) + steps.square()).flatten()
    weighed = mse * (1 + preference * squared_length).unsqueeze(1)
    index = weighed.argmin(dim=0)
    if mode == "centred":
        index = torch.where(mse[CENTRE] <= weighed.amin(dim=0), CENTRE, index)
    rows, columns = index // len(STEPS), index % len(STEPS)
    shifted = _filter_each(_filter_each(target, kernels[rows], -2), kernels[columns], -1)
    shift = torch.stack([steps[rows], steps[columns]], dim=1)
    return Registered(cropped, shifted, shift, index, mse)


def _steps(device: torch.device) -> Tensor:
    """Return ``STEPS`` [9], float64, from a range that the device computes."""
    half = len(STEPS) // 2
    return torch.arange(-half, half + 1, dtype=torch.float64, device=device) / 2


def shift_kernels(mode: Mode, device: torch.device = CPU) -> Tensor:
    """Return the taps [9, 11] of every shift: tap m of shift t weighs the pixel m - 5, seen from t."""
    if mode not in MODES:
        raise UserError(f"registration = {mode!r} is unknown{nearest(mode, MODES)}")
    distance = torch.arange(-HALF_WIDTH, HALF_WIDTH + 1, device=device) - _steps(device).unsqueeze(1)
    if mode == "published":
        # In float32 for all image types, pi included: the published figures depend on it.
        u = math.pi * distance.float() + PUBLISHED_OFFSET
        return LOBES * u.sin() * (u / LOBES).sin() / u.square()
    kernel = torch.sinc(distance) * torch.sinc(distance / LOBES) * (distance.abs() < LOBES)
    # sin(pi n) is not exactly 0 in floating point; whole shifts must copy pixels unchanged.
    kernel = torch.where(distance == distance.round(), (distance == 0).double(), kernel)
    return kernel / kernel.sum(dim=1, keepdim=True)


TAPS: dict[Mode, list[list[float]]] = {mode: shift_kernels(mode).tolist() for mode in MODES}
"""Host numbers of the kernels of :func:`shift_kernels`: reading them off a tensor would split a compiled graph."""


@constant
def _kernels(device: torch.device, mode: Mode) -> Tensor:
    return shift_kernels(mode, device)


@torch.library.custom_op("satfusion::registration_search", mutates_args=())
def _search(prediction: Tensor, target: Tensor, mode: str, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error of every shift [81, B], without a graph.

    It is one operator for ``torch.compile``: as 300 to 2000 operators the search takes minutes to compile. As one
    operator it also rounds, hence chooses between near ties, as without compilation.
    """
    search = _search_centred if mode == "centred" else _search_published
    return search(prediction, target, mask)


@_search.register_fake
def _(prediction: Tensor, target: Tensor, mode: str, mask: Tensor | None = None) -> Tensor:
    return prediction.new_empty(len(STEPS) ** 2, len(prediction))


def _mean_square(error: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean square [B] of [B, C, H, W] over the pixels of a mask; ``error`` is overwritten."""
    square = error.square_()
    if mask is None:
        return square.mean(dim=(1, 2, 3))
    count = error.shape[1] * mask.sum(dim=(1, 2, 3)).clamp(min=1)
    return square.mul_(mask).sum(dim=(1, 2, 3)) / count


def _search_centred(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Search by centred kernels.

    A half-pixel shift has one kernel for all shifts, and whole pixels need none: four images (shifted by half a pixel
    down, right, both and not at all) hold all 81 shifted targets as windows. Windows are compared one at a time: the
    difference of one stays in the processor's cache, that of a row of windows does not.
    """
    height, width = prediction.shape[-2:]
    half_pixel = [tap for tap in TAPS["centred"][STEPS.index(0.5)] if tap != 0]
    errors: dict[tuple[int, int], Tensor] = {}
    for odd_row, rows in enumerate(_phases(target, half_pixel, -2)):
        for odd_column, image in enumerate(_phases(rows, half_pixel, -1)):
            for row in range(image.shape[-2] - height + 1):
                for column in range(image.shape[-1] - width + 1):
                    window = image.narrow(-2, row, height).narrow(-1, column, width)
                    error = _mean_square(window - prediction, mask)
                    errors[2 * row + odd_row, 2 * column + odd_column] = error
    return torch.stack([errors[shift] for shift in sorted(errors)])


def _phases(image: Tensor, half_pixel: list[float], axis: int) -> tuple[Tensor, Tensor]:
    """Return ``image`` as it is and shifted by half a pixel, each from its first shift to its last."""
    length = image.shape[axis] - 2 * HALF_WIDTH
    reach = int(STEPS[-1])
    moved = _correlate(image.narrow(axis, 1, image.shape[axis] - 2), half_pixel, axis)
    return image.narrow(axis, HALF_WIDTH - reach, length + 2 * reach), moved


def _search_published(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Search by published kernels, which differ for every shift."""
    errors = []
    for row_taps in TAPS["published"]:
        rows = _correlate(target, row_taps, -2)
        for column_taps in TAPS["published"]:
            shifted = _correlate(rows, column_taps, -1)
            errors.append(_mean_square(shifted.sub_(prediction), mask))
    return torch.stack(errors)


def _correlate(image: Tensor, taps: list[float], axis: int) -> Tensor:
    """Correlate one axis with ``taps``, without padding; the result is a new tensor.

    A sum of weighted slices instead of a convolution: cuDNN would round the inputs to TF32, which changes near ties and
    makes equal images differ.
    """
    length = image.shape[axis] - len(taps) + 1
    total = image.narrow(axis, 0, length) * taps[0]
    for start, tap in enumerate(taps[1:], 1):
        total.add_(image.narrow(axis, start, length), alpha=tap)
    return total


def _filter_each(image: Tensor, taps: Tensor, axis: int) -> Tensor:
    """Correlate one axis of each sample of [B, C, H, W] with its own row of ``taps`` [B, 11]."""
    length = image.shape[axis] - 2 * HALF_WIDTH
    weights = taps.view(len(taps), -1, 1, 1, 1).unbind(dim=1)
    total = image.narrow(axis, 0, length) * weights[0]
    for start, weight in enumerate(weights[1:], 1):
        total = torch.addcmul(total, image.narrow(axis, start, length), weight)
    return total
