"""Images for people: reflectance to 8 bits, and sheets of labelled tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Just below white: most land lies below a reflectance of 0.3, and clouds may clip.
HIGH_PERCENTILE = 98.0
MARGIN = 6
LABEL_HEIGHT = 16
BACKGROUND = (24, 24, 24)
INK = (230, 230, 230)

Tile = tuple[str, NDArray[np.uint8]]


def to_rgb8(image: NDArray[np.floating], low: float = 0.0, high: float | None = None) -> NDArray[np.uint8]:
    """Stretch an image to 8 bits for display.

    Args:
        image: [3, H, W] as red, green, blue, or [1, H, W], shown as grey.
        low: Value that becomes black.
        high: Value that becomes white; None takes the 98th percentile of the finite values. Tiles that are
            compared need the same value.

    Returns:
        [H, W, 3], with a gamma of 1/1.4 that lifts the dark land surfaces. NaN becomes black.

    Raises:
        ValueError: For another shape.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"to_rgb8 takes [3, H, W] or [1, H, W], got {list(image.shape)}")
    if high is None:
        high = robust_high(image)
    scaled = np.clip((np.nan_to_num(image.astype(np.float64)) - low) / max(high - low, 1e-9), 0.0, 1.0)
    pixels = np.round(scaled ** (1 / 1.4) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


def robust_high(image: NDArray[np.floating]) -> float:
    """Return the value to show as white: the 98th percentile of the finite values, and at least 1e-3."""
    finite = image[np.isfinite(image)]
    return max(float(np.percentile(finite, HIGH_PERCENTILE)), 1e-3) if finite.size else 1.0


def sheet(rows: Sequence[Sequence[Tile]], *, tile_size: int | None = None) -> Image.Image:
    """Lay out rows of labelled tiles on a dark sheet.

    Args:
        rows: Lists of (label, uint8 image [H, W, 3]); rows may differ in length.
        tile_size: Longer side of every tile after scaling, px (nearest pixel when enlarged, so that coarse images
            look coarse); None does not scale.

    Returns:
        The sheet as an RGB image.

    Raises:
        ValueError: If there is no tile.
    """
    drawn = [[(label, _scaled(Image.fromarray(pixels), tile_size)) for label, pixels in row] for row in rows]
    if not any(drawn):
        raise ValueError("a sheet needs at least one tile")
    widths = [sum(tile.width + MARGIN for _, tile in row) + MARGIN for row in drawn]
    heights = [max((tile.height for _, tile in row), default=0) + LABEL_HEIGHT + MARGIN for row in drawn]
    page = Image.new("RGB", (max(widths), sum(heights) + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(12)
    top = MARGIN
    for row, height in zip(drawn, heights, strict=True):
        left = MARGIN
        for label, tile in row:
            draw.text((left, top), _fitted(label, tile.width, font), fill=INK, font=font)
            page.paste(tile, (left, top + LABEL_HEIGHT))
            left += tile.width + MARGIN
        top += height
    return page


def _fitted(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten a label to the width of its tile, so that labels do not overlap."""
    while label and font.getlength(label) > width:
        label = label[:-2] + "…" if len(label) > 2 else ""
    return label


def _scaled(tile: Image.Image, size: int | None) -> Image.Image:
    if size is None:
        return tile
    factor = size / max(tile.size)
    shape = (max(1, round(tile.width * factor)), max(1, round(tile.height * factor)))
    return tile.resize(shape, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX)
