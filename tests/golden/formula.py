"""Deterministic tensors for the golden cases: weights and inputs are functions of their names and shapes.

The stream is numpy's legacy ``RandomState`` (frozen by numpy's compatibility policy), seeded with the CRC-32
of the name, so no weight file has to travel with the expected outputs.
"""

from __future__ import annotations

import zlib

import numpy as np


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float64 array that depends on ``name`` and ``shape`` alone."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Value of the reference parameter or buffer ``name`` (float32), scaled to keep activations near 1."""
    z = normal("weight:" + name, shape)
    if name.endswith("running_var"):
        z = 1 + 0.1 * np.abs(z)
    elif len(shape) >= 2:
        z = z / np.sqrt(np.prod(shape[1:]))
    elif shape == (1,):
        z = 0.25 + 0.05 * z  # PReLU slopes
    elif name.endswith("weight"):
        z = 1 + 0.1 * z  # normalisation scales
    else:
        z = 0.05 * z  # biases and running means
    return z.astype(np.float32)


def image(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Smooth reflectance-like image in (0, 0.6), float32, last two axes are height and width."""
    z = normal("image:" + name, shape)
    for axis in (-2, -1):
        z = (np.roll(z, 1, axis) + 2 * z + np.roll(z, -1, axis)) / 4
        z = (np.roll(z, 2, axis) + 2 * z + np.roll(z, -2, axis)) / 4
    return (0.3 / (1 + np.exp(-2 * z)) + 0.05).astype(np.float32)


def probe(array: np.ndarray) -> np.ndarray:
    """What a golden case keeps of an output: every fifth pixel of the last two axes."""
    return np.asarray(array)[..., ::5, ::5]
