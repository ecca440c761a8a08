"""Shift between two images, to a fraction of a pixel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST, HIGHEST = 0.02, 0.15
"""Band of the phases that count, cycles per pixel: lower ones belong to the window, higher ones to a fused image's
noise."""

SEARCH = ((8.0, 0.5), (0.5, 0.05), (0.05, 0.005))
"""Reach and step of each round, pixels."""


def offset(moved: Tensor, reference: Tensor, border: int = 8) -> tuple[float, float]:
    """Return (dy, dx) in pixels: ``moved`` shows the content of ``reference`` shifted down by dy and right by dx.

    Phase correlation (Kuglin and Hines, 1975) with square roots of the spectra's amplitudes instead of unit amplitudes,
    so that frequencies lost in a blurred image count less than those kept; sub-pixel by matrix products that evaluate
    the correlation on ever finer grids (Guizar-Sicairos, Thurman and Fienup, 2008). A Hann window suppresses content
    that enters at the borders.

    Args:
        moved: Image [C, H, W].
        reference: Image of the same shape.
        border: Pixels cropped at each side, where a fused image may have a frame.
    """
    spectrum, other = _spectrum(moved, border), _spectrum(reference, border)
    rows, columns = (torch.fft.fftfreq(length, dtype=torch.float64) for length in spectrum.shape)
    square = rows.unsqueeze(1).square() + columns.square()
    band = torch.exp(-square / (2 * HIGHEST**2)) * (1 - torch.exp(-square / (2 * LOWEST**2)))
    cross = spectrum * other.conj()
    cross = band * cross / (cross.abs() + 1e-12).sqrt()
    y = x = 0.0
    for reach, step in SEARCH:
        steps = torch.arange(-reach, reach + step / 2, step, dtype=torch.float64)
        left = torch.exp(2j * math.pi * (y + steps).unsqueeze(1) * rows)
        right = torch.exp(2j * math.pi * columns.unsqueeze(1) * (x + steps))
        best = int((left @ cross @ right).real.argmax())
        y += steps[best // len(steps)].item()
        x += steps[best % len(steps)].item()
    return y, x


def _spectrum(image: Tensor, border: int) -> Tensor:
    """Return the windowed spectrum of the mean over bands."""
    grey = image.double().mean(dim=0)[border:-border, border:-border]
    rows, columns = (torch.hann_window(length, periodic=False, dtype=torch.float64) for length in grey.shape)
    window = rows.unsqueeze(1) * columns
    return torch.fft.fft2((grey - (grey * window).sum() / window.sum()) * window)
