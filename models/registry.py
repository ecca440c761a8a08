"""Registry of every encoder and head by name; only this module builds models."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection

from torch import nn

from models.config import ModelConfig, Padding
from models.contracts import Encoder, Head, Size, Stage
from models.encoders.highresnet import HighResNet
from models.encoders.rams import RAMS
from models.encoders.srcnn import SRCNN
from models.encoders.trnet import TRNet
from models.encoders.trnet_pan import TRNetPan
from models.heads.arconv.head import ARConv
from models.heads.innformer import INNformer
from models.heads.pan_mamba.head import PanMamba
from models.heads.pannet import PanNet
from models.heads.pnn import PNN
from models.heads.u2net import U2Net
from models.satfusion import SatFusion

ENCODERS: dict[str, type[Encoder]] = {
    "srcnn": SRCNN,
    "highresnet": HighResNet,
    "rams": RAMS,
    "trnet": TRNet,
    "trnet_pan": TRNetPan,
}
HEADS: dict[str, type[Head]] = {
    "pnn": PNN,
    "pannet": PanNet,
    "innformer": INNformer,
    "u2net": U2Net,
    "pan_mamba": PanMamba,
    "arconv": ARConv,
}
LEAST_MIRRORED = 8
"""Least side of an image for padding by reflection, px: some heads halve it twice, others mirror 4 px."""

ABSENT = "none"
"""Name of an absent stage."""

ALIASES = {"psit": "innformer"}
"""Published names that differ from ours, in lower case."""


def parse_pair(text: str) -> tuple[str, str]:
    """Return encoder and head of ``ENCODER+HEAD``, given in our names or the published ones, in any case.

    Raises:
        ValueError: If it has no plus sign, or a name is unknown.
    """
    encoder, plus, head = (ALIASES.get(part, part) for part in text.strip().lower().partition("+"))
    if not plus:
        raise ValueError(f"{text!r} is not a model: name ENCODER+HEAD, for example {next(iter(ENCODERS))}+{ABSENT}")
    _check_name("encoder", encoder, (*ENCODERS, ABSENT))
    _check_name("head", head, (*HEADS, ABSENT))
    return encoder, head


def all_pairs() -> list[tuple[str, str]]:
    """Return (encoder, head) of every model: each stage alone, and each encoder with each head."""
    everything = itertools.product((ABSENT, *ENCODERS), (ABSENT, *HEADS))
    return [pair for pair in everything if pair != (ABSENT, ABSENT)]


def stages(config: ModelConfig) -> list[type[Stage]]:
    """Return the classes of the encoder and the head, without those that are absent."""
    found: list[type[Stage]] = []
    if config.encoder != ABSENT:
        found.append(ENCODERS[config.encoder])
    if config.head != ABSENT:
        found.append(HEADS[config.head])
    return found


def check_config(config: ModelConfig) -> None:
    """Refuse a configuration that cannot be built, before any model is built.

    Raises:
        ValueError: If a name is unknown, both stages are absent, or a stage cannot be built for it; the message gives
            the reason.
    """
    _check_name("encoder", config.encoder, (*ENCODERS, ABSENT))
    _check_name("head", config.head, (*HEADS, ABSENT))
    if config.encoder == ABSENT and config.head == ABSENT:
        raise ValueError(f"encoder and head are both {ABSENT!r}: a model needs at least one of them")
    if config.padding == "reflect" and config.encoder == "rams" and config.revisits < 2:
        raise ValueError("padding = 'reflect' mirrors the revisits too in RAMS, which needs 2 of them: use 'replicate'")
    for stage in stages(config):
        stage.check_config(config)


def check_sizes(config: ModelConfig, lr: Size, pan: Size) -> None:
    """Refuse sizes before any model is built.

    Args:
        config: The model.
        lr: Height and width of the revisits, pixels.
        pan: Height and width of the panchromatic image, pixels.

    Raises:
        ValueError: If a stage cannot take them; the message names the stage and the sizes that it can take.
    """
    if config.padding == "reflect" and min(*lr, *pan) < LEAST_MIRRORED:
        raise ValueError(
            f"padding = 'reflect' needs images of at least {LEAST_MIRRORED} x {LEAST_MIRRORED} px, and these are "
            f"{lr[0]} x {lr[1]} and {pan[0]} x {pan[1]}: use 'replicate'"
        )
    for stage in stages(config):
        stage.check_sizes(config, lr, pan)


def build_model(config: ModelConfig) -> SatFusion:
    """Build the model with PyTorch's global generator for its initial weights.

    Raises:
        ValueError: Like `check_config`.
    """
    check_config(config)
    encoder = None if config.encoder == ABSENT else ENCODERS[config.encoder](config)
    head = None if config.head == ABSENT else HEADS[config.head](config)
    for part in (encoder, head):
        if part is not None:
            _set_padding(part, config.padding)
    return SatFusion(config, encoder, head)


def _set_padding(stage: Stage, mode: Padding) -> None:
    """Set the padding of every convolution of a stage that pads with zeros; parameters stay as they are."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.padding_mode == "zeros" and any(module.padding):
            module.padding_mode = mode


def _check_name(field: str, name: str, known: Collection[str]) -> None:
    if name in known:
        return
    if name.lower() in ALIASES:
        raise ValueError(f"{field} = {name!r} is called {ALIASES[name.lower()]!r} here")
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    advice = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    raise ValueError(f"{field} = {name!r} is unknown; {advice}")
