"""Plot of an efficiency over the number of GPUs, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 900, 610
LEFT, TOP, RIGHT, BOTTOM = 90, 30, 870, 400
"""Edges of the plot, px; the legend is below."""
COLOURS = ("#0b6e99", "#5b8c2a", "#8a4f9e", "#c4532f", "#b58a00", "#555f6b")


def draw(path: Path, gpus: Sequence[int], lines: Mapping[str, Sequence[float]]) -> None:
    """Draw one line a name over evenly spaced numbers of GPUs; values are shares from 0 to 1."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(16)
    xs = [LEFT + place * (RIGHT - LEFT) / (len(gpus) - 1) for place in range(len(gpus))]

    def y(share: float) -> float:
        return BOTTOM - share * (BOTTOM - TOP)

    for percent in range(0, 101, 20):
        pen.line((LEFT, y(percent / 100), RIGHT, y(percent / 100)), "#cccccc")
        pen.text((LEFT - 10, y(percent / 100)), f"{percent} %", "black", font, "rm")
    for x, count in zip(xs, gpus, strict=True):
        pen.text((x, BOTTOM + 8), str(count), "black", font, "ma")
    pen.text(((LEFT + RIGHT) / 2, BOTTOM + 32), "number of GPUs (8 chips each)", "black", font, "ma")
    pen.text((LEFT, 5), "predicted share of a step's time in which the GPUs compute, %", "black", font)
    for place, (name, values) in enumerate(lines.items()):
        colour = COLOURS[place % len(COLOURS)]
        points = [(x, y(value)) for x, value in zip(xs, values, strict=True)]
        pen.line(points, colour, 3)
        for point in points:
            pen.circle(point, 5, colour)
        row = BOTTOM + 68 + 22 * place
        pen.line((LEFT, row, LEFT + 40, row), colour, 3)
        pen.text((LEFT + 50, row), name, "black", font, "lm")
    image.save(path, optimize=True)
