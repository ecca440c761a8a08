"""Configuration of a model: plain values, checked for their range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

DROPOUTS = ("off", "published")
Padding = Literal["zeros", "reflect", "replicate"]
PADDINGS = get_args(Padding)
_RANGES = {
    "bands": (1, 1000),
    "revisits": (1, 1000),
    "hidden": (1, 65_536),
    "zoom": (1, 64),
    "kernel_freeze_step": (0, 10**12),
}


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of one model.

    The registry (`models.registry.check_config`) checks that an encoder and a head of these names exist and that they
    can be built with these values.

    Raises:
        ValueError: If a number is out of range, or ``dropout`` is unknown.
    """

    encoder: str = "srcnn"
    """Name of the multi-frame encoder, or "none"."""

    head: str = "pnn"
    """Name of the pansharpening head, or "none"."""

    bands: int = 3
    """Number of bands of the revisits and of the result, at least 1."""

    revisits: int = 8
    """Number R of revisits a sample, at least 1."""

    hidden: int = 128
    """Width D of the encoder's features; a multiple of zoom squared."""

    zoom: int = 2
    """Factor of the pixel shuffle, at least 1; the remaining enlargement to the output grid is bilinear."""

    dropout: str = "off"
    """Dropout: "off" or "published", the rates of the published training."""

    padding: Padding = "zeros"
    """Continuation of an image beyond its border in the convolutions that keep its size: "zeros", as published,
    "reflect" or "replicate". A few convolutions always mirror, as published."""

    published: bool = False
    """Whether the model computes and holds exactly the same as the published one, unused parameters included, within
    its limits of size, bands and revisits; docs/published.md lists the differences for each model."""

    kernel_freeze_step: int = 1000
    """Optimizer steps after which ARConv keeps its last chosen kernel sizes; other heads ignore it."""

    def __post_init__(self) -> None:
        """Refuse values that no model can have."""
        if self.dropout not in DROPOUTS:
            raise ValueError(f"dropout = {self.dropout!r} is unknown; known: {', '.join(DROPOUTS)}")
        if self.padding not in PADDINGS:
            raise ValueError(f"padding = {self.padding!r} is unknown; known: {', '.join(PADDINGS)}")
        if self.published and self.padding != "zeros":
            raise ValueError(f"padding = {self.padding!r} is not the published one: it is 'zeros'")
        for field, (low, high) in _RANGES.items():
            value = getattr(self, field)
            if not low <= value <= high:
                raise ValueError(f"{field} = {_shown(value)} is out of range: it must be from {low:,} to {high:,}")
        if self.hidden % self.zoom**2:
            raise ValueError(
                f"hidden = {self.hidden} cannot be shuffled into zoom = {self.zoom}: "
                f"it must be a multiple of {self.zoom**2}"
            )


def _shown(value: int) -> str:
    return str(value) if abs(value) < 10**30 else "a number of more than 30 digits"
