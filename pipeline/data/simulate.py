"""Revisits simulated from the target, as the published training does, instead of reading Sentinel-2's.

``sensor`` is the mode of the published training, validation and test; ``shifts`` is the older recipe. Shifting,
blurring, pooling and resizing are linear and separable in rows and columns, so all of them together are one small
matrix per axis. Both modes work on one chip at a time, on its device, and draw from a generator of that chip, always on
the CPU: results of GPU and CPU differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.order import random_words

Simulator = Callable[[Tensor, int, tuple[int, int], torch.Generator], Tensor]

SENSOR_SHIFT = 3.0
"""Largest shift of the sensor in either direction along each axis, target pixels."""
SENSOR_BLUR = (1.5, 2.0)
"""Range of the standard deviation of the point spread function, target pixels."""
SENSOR_POOLING = 4
"""Target pixels that one sensor pixel averages, along each axis."""
FULL_SCALE = 1000.0
"""Photon count of reflectance 1; shot noise is the root of the count."""
READ_NOISE = 0.001
"""Standard deviation of the read noise, reflectance."""

INTEGER_SHIFT = 2
"""Largest shift of a revisit in mode ``shifts``, in either direction along each axis, revisit pixels."""
SHIFTS_BLUR = (0.1, 2.0)
"""Range of the standard deviation of its blur, target pixels."""
SHIFTS_REACH = 2
"""Taps of its blur on either side of the middle."""
RELATIVE_NOISE = 0.03
"""Standard deviation of its noise, as a share of the revisit's."""
BRIGHTNESS = (0.9, 1.1)
"""Range of the brightness factor of a revisit."""


def chip_generator(seed: int, epoch: int, chip: int) -> torch.Generator:
    """Return the generator of one chip's simulation in one epoch; it depends on nothing else."""
    return torch.Generator().manual_seed(int(random_words(1, seed, epoch, chip, "simulate")[0]) >> 1)


def sensor_revisits(target: Tensor, revisits: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Simulate a sensor at another position each time: shift, point spread, larger pixels, shot and read noise.

    As published, 4 x 4 target pixels are averaged for any ratio of the grids, and the result is enlarged to ``size``
    (156 to 39 to 50).

    Args:
        target: High-resolution image [C, H, W], reflectance, 7 px or more a side.
        revisits: Number of revisits R.
        size: Rows and columns (h, w) of a revisit.
        generator: Source of the randomness: shifts along x, along y, deviations, shot noise, read noise.

    Returns:
        [R, C, h, w] float32, 0 to 1.
    """
    shift_x, shift_y = (uniform(revisits, -SENSOR_SHIFT, SENSOR_SHIFT, generator) for _ in "xy")
    deviation = uniform(revisits, *SENSOR_BLUR, generator)
    # A narrower point spread is also cut off earlier: at 5 px up to a deviation of 1.83, then at 6 px.
    reach = (3 * deviation + 0.5).floor().clamp(min=1)
    taps = gaussian(deviation, reach)

    rows, columns = (
        functional.interpolate(
            functional.avg_pool1d(blur(move(length, shift), taps), SENSOR_POOLING), pixels, mode="linear"
        )
        for length, shift, pixels in zip(target.shape[-2:], (shift_y, shift_x), size, strict=True)
    )
    seen = apply(rows, columns, target)
    shot, read = (torch.randn(seen.shape, generator=generator).to(seen.device) for _ in range(2))
    seen = seen + shot * (FULL_SCALE * seen).clamp(min=0).sqrt() / FULL_SCALE
    return (seen + READ_NOISE * read).clamp(0, 1)


def shifted_revisits(target: Tensor, revisits: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Simulate revisits that differ by whole pixels, noise and brightness: the older published recipe.

    As published, one blur serves all revisits, resizing does not average although it shrinks, and shifts fill in zeros.

    Args:
        target: High-resolution image [C, H, W], reflectance, 3 px or more a side.
        revisits: Number of revisits R.
        size: Rows and columns (h, w) of a revisit.
        generator: Source of the randomness: deviation of the blur, shifts along x, along y, noise, brightness.

    Returns:
        [R, C, h, w] float32, 0 to 1.
    """
    deviation = uniform(1, *SHIFTS_BLUR, generator)
    taps = gaussian(deviation, torch.full_like(deviation, SHIFTS_REACH))
    still = torch.zeros_like(deviation)
    rows, columns = (
        functional.interpolate(blur(move(length, still), taps), pixels, mode="linear")
        for length, pixels in zip(target.shape[-2:], size, strict=True)
    )
    seen = apply(rows, columns, target)[0]
    most = INTEGER_SHIFT
    shift_x, shift_y = (torch.randint(-most, most + 1, (revisits,), generator=generator).tolist() for _ in "xy")
    padded = functional.pad(seen, (most, most, most, most))
    moved = torch.stack(
        [
            padded.narrow(1, most - y, size[0]).narrow(2, most - x, size[1])
            for x, y in zip(shift_x, shift_y, strict=True)
        ]
    )
    # In float64, so that rounding hides the order of the sum, which depends on the number of threads.
    contrast = moved.double().std(dim=(1, 2, 3), keepdim=True).float()
    noise = torch.randn(moved.shape, generator=generator).to(moved.device)
    noisy = (moved + RELATIVE_NOISE * contrast * noise).clamp(0, 1)
    brightness = uniform(revisits, *BRIGHTNESS, generator).float().to(moved.device)
    return (noisy * brightness.view(-1, 1, 1, 1)).clamp(0, 1)


SIMULATORS: dict[str, Simulator] = {"shifts": shifted_revisits, "sensor": sensor_revisits}


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Return random numbers [count], float64 on the CPU, from ``low`` to ``high``."""
    return low + (high - low) * torch.rand(count, dtype=torch.float64, generator=generator)


def gaussian(deviation: Tensor, reach: Tensor) -> Tensor:
    """Return taps [R, K] of sum 1, zero beyond the ``reach`` [R] of each deviation [R]; K is odd."""
    most = int(reach.max())
    tap = torch.arange(-most, most + 1, dtype=torch.float64)
    taps = torch.exp(-tap.square() / (2 * deviation.square().unsqueeze(1))) * (tap.abs() <= reach.unsqueeze(1))
    return taps / taps.sum(dim=1, keepdim=True)


def move(length: int, shift: Tensor) -> Tensor:
    """Return matrices [R, length, length] that shift an axis by each ``shift`` [R], from their rows to their columns.

    Bilinear: pixel i of the result is read at i - shift, clamped to the image.
    """
    pixel = torch.arange(length, dtype=torch.float64)
    place = (pixel - shift.unsqueeze(1)).clamp(0, length - 1)
    return (1 - (pixel.unsqueeze(1) - place.unsqueeze(1)).abs()).clamp(min=0)


def blur(axis: Tensor, taps: Tensor) -> Tensor:
    """Correlate the last axis of [R, N, L] with the taps [R, K] of each; the border is mirrored without the edge."""
    reach = taps.shape[1] // 2
    padded = functional.pad(axis, (reach, reach), mode="reflect").transpose(0, 1)
    return functional.conv1d(padded, taps.unsqueeze(1), groups=len(taps)).transpose(0, 1)


def apply(rows: Tensor, columns: Tensor, target: Tensor) -> Tensor:
    """Return ``target`` [C, H, W] or [R, C, H, W] multiplied by matrices [R, H, h] and [R, W, w], float32 [R, C, h, w].

    In float64, so that neither the threads nor the machine's matrix product change the result.
    """
    left, right = rows.mT.unsqueeze(1).to(target.device), columns.unsqueeze(1).to(target.device)
    return (left @ target.double() @ right).float()
