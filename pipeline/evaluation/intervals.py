"""Confidence intervals of means over AOIs, by the bootstrap. numpy only, and all draws are seeded.

Chips of one AOI resemble each other, so AOIs are drawn, each with all its chips. The intervals are BCa: bias-corrected
and accelerated (Efron, "Better bootstrap confidence intervals", JASA 82, 1987).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

METHOD = "BCa bootstrap over AOIs"
LEVEL = 0.95
"""Probability with which an interval covers the mean of all such AOIs."""
DRAWS = 2000
SEED = 20240917
LEAST = 5
"""AOIs below which no interval is given: so few say nothing of the others."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over chips and its interval."""

    mean: float
    """The mean."""
    low: float
    """Lower end of the interval; NaN for fewer than LEAST AOIs, or if a value is not finite."""
    high: float
    """Upper end; NaN likewise."""
    aois: int
    """Number of AOIs."""

    def __str__(self) -> str:
        """Return the numbers with four digits, such as ``34.21 [33.02, 35.16]``; a dash for no mean."""
        if math.isnan(self.mean):
            return "-"
        if math.isnan(self.low):
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def excludes_zero(self) -> bool:
        """Return whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def estimate(sums: Values, counts: Values, *, seed: int = SEED, draws: int = DRAWS, level: float = LEVEL) -> Estimate:
    """Return the mean over all chips with its interval.

    Args:
        sums: Sum of the values of each AOI's chips [A].
        counts: Number of each AOI's chips [A], above 0.
        seed: Seed of the draws.
        draws: Number of draws.
        level: Probability of coverage.

    Raises:
        ValueError: There is no AOI.
    """
    aois = len(sums)
    if not aois:
        raise ValueError("a mean over no AOI does not exist")
    mean = float(sums.sum() / counts.sum())
    if aois < LEAST or not np.isfinite(sums).all():
        return Estimate(mean, math.nan, math.nan, aois)
    drawn = np.random.default_rng(seed).integers(aois, size=(draws, aois))
    means = np.sort(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = _bca(means, mean, (sums.sum() - sums) / (counts.sum() - counts), level)
    return Estimate(mean, low, high, aois)


def _bca(means: Values, mean: float, without: Values, level: float) -> tuple[float, float]:
    """Return the ends of the interval, from the sorted means of the draws and the means without each AOI."""
    if means[0] == means[-1]:
        return float(means[0]), float(means[0])
    normal = NormalDist()
    below = (np.count_nonzero(means < mean) + 0.5 * np.count_nonzero(means == mean)) / len(means)
    # An end of the draws, which only a few AOIs reach, would have no normal quantile.
    bias = normal.inv_cdf(min(max(float(below), 0.5 / len(means)), 1 - 0.5 / len(means)))
    away = without.mean() - without
    spread = float((away**2).sum() ** 1.5)
    acceleration = float((away**3).sum()) / (6 * spread) if spread else 0.0
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + normal.inv_cdf(tail)
        place = normal.cdf(bias + shifted / (1 - acceleration * shifted))
        ends.append(float(np.quantile(means, place)))
    return ends[0], ends[1]
