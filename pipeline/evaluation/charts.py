"""Charts as inline SVG: distributions of values by method, and curves over levels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from pipeline.evaluation.intervals import Estimate

WIDTH = 560
LEFT = 150
"""Space for labels left of the plot, px."""
ROW = 44
"""Height of a method's distribution, px."""
BINS = 40
COLOURS = ("#0b6e99", "#c4532f", "#5b8c2a", "#8a4f9e", "#b58a00", "#555f6b", "#a23b63")


def distributions(title: str, values: Mapping[str, Sequence[float]]) -> str:
    """Draw the distribution of each method's values as bars over a common axis, with the median as a line.

    Args:
        title: Name of the values and their unit.
        values: Values by method; others than finite numbers are left out.
    """
    finite = {name: np.array([value for value in own if math.isfinite(value)]) for name, own in values.items()}
    everyone = np.concatenate([np.empty(0), *finite.values()])
    if not everyone.size:
        return ""
    low, high = _range(everyone)
    parts = []
    for number, (name, own) in enumerate(finite.items()):
        base = 24 + (number + 1) * ROW
        parts.append(_text(LEFT - 8, base - 8, name, "end"))
        parts.append(f'<line x1="{LEFT}" y1="{base}" x2="{WIDTH}" y2="{base}" stroke="#ccc"/>')
        if not own.size:
            continue
        counts, _ = np.histogram(own, BINS, (low, high))
        wide = (WIDTH - LEFT) / BINS
        for place, count in enumerate(counts):
            if count:
                tall = (ROW - 10) * count / counts.max()
                parts.append(
                    f'<rect x="{LEFT + place * wide:.1f}" y="{base - tall:.1f}" width="{wide - 1:.1f}"'
                    f' height="{tall:.1f}" fill="{_colour(number)}"/>'
                )
        middle = LEFT + (float(np.median(own)) - low) / (high - low) * (WIDTH - LEFT)
        parts.append(f'<line x1="{middle:.1f}" y1="{base - ROW + 8}" x2="{middle:.1f}" y2="{base}" stroke="#000"/>')
    bottom = 24 + len(finite) * ROW
    return _svg(title, bottom + 22, [*parts, *_ticks(low, high, bottom + 16)])


def curves(title: str, unit: str, points: Mapping[str, Mapping[float, Estimate]]) -> str:
    """Draw the mean of each method over levels, with its interval as a vertical bar.

    Args:
        title: Name of the values and their unit.
        unit: Name of the levels and their unit.
        points: Means by method and level.
    """
    found = [estimate for levels in points.values() for estimate in levels.values()]
    ends = np.array([value for each in found for value in (each.mean, each.low, each.high) if math.isfinite(value)])
    if not ends.size:
        return ""
    low, high = _range(ends)
    first, last = _range(np.array([level for levels in points.values() for level in levels]))
    tall, parts = 200, []

    def x(level: float) -> float:
        return LEFT + (level - first) / (last - first) * (WIDTH - LEFT - 10)

    def y(value: float) -> float:
        return 24 + (high - value) / (high - low) * (tall - 24)

    for number, (name, levels) in enumerate(points.items()):
        own = sorted((level, each) for level, each in levels.items() if math.isfinite(each.mean))
        line = " ".join(f"{x(level):.1f},{y(each.mean):.1f}" for level, each in own)
        colour = _colour(number)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for level, each in own:
            parts.append(f'<circle cx="{x(level):.1f}" cy="{y(each.mean):.1f}" r="3" fill="{colour}"/>')
            if math.isfinite(each.low):
                parts.append(
                    f'<line x1="{x(level):.1f}" y1="{y(each.low):.1f}" x2="{x(level):.1f}" y2="{y(each.high):.1f}"'
                    f' stroke="{colour}"/>'
                )
        parts.append(_text(8, 40 + 18 * number, name, "start", colour))
    parts += [_text(LEFT - 8, y(value) + 4, f"{value:.4g}", "end") for value in (low, (low + high) / 2, high)]
    levels_drawn = sorted({level for levels in points.values() for level in levels})
    parts += [_text(x(level), tall + 16, f"{level:g}", "middle") for level in levels_drawn]
    parts.append(_text((LEFT + WIDTH) / 2, tall + 34, unit, "middle"))
    return _svg(title, tall + 42, parts)


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the least and the largest value, apart from each other."""
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _ticks(low: float, high: float, y: float) -> list[str]:
    places = ((0, "start"), (0.5, "middle"), (1, "end"))
    return [
        _text(LEFT + share * (WIDTH - LEFT), y, f"{low + share * (high - low):.4g}", anchor) for share, anchor in places
    ]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH + 10} {height:.0f}" width="{WIDTH + 10}" role="img" aria-label="{escape(title)}">'
        f"{_text(LEFT, 16, title, 'start')}{''.join(parts)}</svg>"
    )
