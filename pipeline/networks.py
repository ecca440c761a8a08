"""Networks with trained weights: of a run's checkpoint, or of a file that the published code wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from models.config import ModelConfig
from models.published import identify, load_published, read_published
from models.registry import build_model, parse_pair
from models.satfusion import SatFusion
from pipeline.training.checkpoint import Checkpoint
from sharding.errors import UserError
from sharding.files import regular_file

Weights = Literal["raw", "ema"]
"""Weights of a checkpoint: as trained, or their exponential moving average (``train.ema``)."""


def load_weights(checkpoint: Checkpoint, weights: Weights) -> SatFusion:
    """Return the checkpoint's network with its trained weights or their average.

    Raises:
        UserError: The checkpoint has no average.
    """
    if weights == "ema" and not checkpoint.state.ema:
        raise UserError(
            f"--weights ema needs a moving average, and checkpoint {checkpoint.name} has none (its train.ema is "
            f"{checkpoint.config.train.ema:g}): give --weights raw"
        )
    return load_network(checkpoint, checkpoint.state.ema if weights == "ema" else None)


def load_network(checkpoint: Checkpoint, average: Mapping[str, Tensor] | None = None) -> SatFusion:
    """Return the checkpoint's network with its weights, or with their average and the weights' buffers."""
    network = build_model(checkpoint.config.model)
    network.load_state_dict(checkpoint.state.weights | dict(average or {}))
    network.at_step(checkpoint.position.step)
    return network


def load_published_network(path: Path, pair: str, *, bands: int, revisits: int) -> SatFusion:
    """Return the published form of ``pair`` with the weights of a published file; width and zoom are the published.

    Args:
        path: The file, see `models.published.read_published`.
        pair: ``ENCODER+HEAD``.
        bands: Bands of the revisits.
        revisits: Revisits a sample.

    Raises:
        UserError: No such model, or the file is unreadable or of another model.
    """
    regular_file("--published-checkpoint", path)
    try:
        encoder, head = parse_pair(pair)
        state = read_published(path)
        config = ModelConfig(encoder, head, bands=bands, revisits=revisits, published=True)
        network = build_model(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        load_published(network, state)
    except ValueError as error:
        known = identify(state, config)
        advice = f"; it is one of {known.encoder}+{known.head}" if known and known != config else ""
        if known and known.revisits != config.revisits:
            advice += f" at {known.revisits} revisits"
        raise UserError(f"{path} does not fit {encoder}+{head} at {revisits} revisits: {error}{advice}") from None
    # The state that training left, as in the published test, which ran after training in the same process.
    network.at_step(config.kernel_freeze_step)
    return network


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of a state dict: its names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
