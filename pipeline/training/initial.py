"""Weights that a new run starts from: those of another run, or of a checkpoint of the published code."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.published import load_published, read_published
from models.satfusion import SatFusion
from pipeline.config import TrainConfig
from pipeline.training.checkpoint import read_checkpoint, select_checkpoint
from sharding.errors import UserError
from sharding.storage import open_storage

logger = logging.getLogger(__name__)


def load_initial(network: SatFusion, config: TrainConfig) -> None:
    """Fill ``network`` from ``train.init``, and log the parameters that start fresh.

    Raises:
        UserError: The weights cannot be read, none fits, or a published checkpoint is not of this model.
    """
    _load(network, config)
    network.at_step(0)


def _load(network: SatFusion, config: TrainConfig) -> None:
    if Path(config.init).is_file():
        _load_published(network, config.init)
        return
    run = open_storage(config.init)
    name = select_checkpoint(run, config.init_checkpoint)
    weights = read_checkpoint(run, name).state.weights
    own = network.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        raise UserError(f"train.init = {config.init!r}: no parameter of {name} has the name and shape of this model's")
    network.load_state_dict(own | fitting)
    logger.info("weights start from %s/checkpoints/%s%s", run.uri, name, _fresh(own, fitting))


def _load_published(network: SatFusion, file: str) -> None:
    try:
        load_published(network, read_published(file))
    except ValueError as error:
        raise UserError(f"train.init = {file!r} does not fit this model: {error}") from None
    logger.info("weights start from the published checkpoint %s", file)


def _fresh(own: Mapping[str, Tensor], fitting: Mapping[str, Tensor]) -> str:
    names = [name for name in own if name not in fitting]
    return f"; these start fresh: {', '.join(names)}" if names else ""
