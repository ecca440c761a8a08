"""Every encoder and head by name, and the one place that builds a model."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass

from models.contracts import Encoder, Head
from models.encoders.highresnet import HighResNet
from models.encoders.srcnn import SRCNN
from models.heads.pannet import PanNet
from models.heads.pnn import PNN
from models.satfusion import SatFusion

ENCODERS: dict[str, type[Encoder]] = {
    "srcnn": SRCNN,
    "highresnet": HighResNet,
}
HEADS: dict[str, type[Head]] = {
    "pnn": PNN,
    "pannet": PanNet,
}
ABSENT = "none"
"""The name of a stage that a model does without."""

DROPOUTS = ("off", "published")


@dataclass(frozen=True)
class ModelConfig:
    """Which model to build.

    Raises:
        ValueError: If a name is unknown, a number is out of range, or both stages are absent.
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
    """Factor of the pixel shuffle, at least 1; the rest of the way to the output grid is bilinear."""

    dropout: str = "off"
    """Either "off" or "published": at the rates of the published training."""

    def __post_init__(self) -> None:
        _check_name("encoder", self.encoder, (*ENCODERS, ABSENT))
        _check_name("head", self.head, (*HEADS, ABSENT))
        _check_name("dropout", self.dropout, DROPOUTS)
        if self.encoder == ABSENT and self.head == ABSENT:
            raise ValueError(f"encoder and head are both {ABSENT!r}: a model needs at least one of them")
        for field in ("bands", "revisits", "hidden", "zoom"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} = {getattr(self, field)} is out of range: it must be at least 1")
        if self.hidden % self.zoom**2:
            raise ValueError(
                f"hidden = {self.hidden} cannot be shuffled into zoom = {self.zoom}: "
                f"it must be a multiple of {self.zoom**2}"
            )


def build_model(config: ModelConfig) -> SatFusion:
    """Build the model with PyTorch's global generator for its initial weights."""
    encoder = None if config.encoder == ABSENT else ENCODERS[config.encoder](config)
    head = None if config.head == ABSENT else HEADS[config.head](config)
    return SatFusion(config, encoder, head)


def _check_name(field: str, name: str, known: Collection[str]) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    advice = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    raise ValueError(f"{field} = {name!r} is unknown; {advice}")
