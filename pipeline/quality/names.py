"""Names of the metrics; this module imports nothing slow."""

from __future__ import annotations

METRICS = ("mse", "mae", "psnr", "ssim", "sam", "ergas")
"""Names of the metrics: reflectance squared, reflectance, decibels, 0 to 1, degrees, percent."""

ADJUSTED = "_adjusted"
"""Suffix of the metrics after bias adjustment."""
