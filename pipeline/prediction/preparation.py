"""Preparation of the scenes that weights were trained on."""

from __future__ import annotations

import logging

from models.config import ModelConfig
from pipeline.training.checkpoint import Checkpoint
from sharding.errors import UserError
from sharding.format.index import Index
from sharding.prepare.options import SampleOptions
from sharding.storage import open_storage

logger = logging.getLogger(__name__)


def training_preparation(checkpoint: Checkpoint) -> SampleOptions:
    """Return the preparation of the dataset that a checkpoint was trained on.

    If the dataset is gone or another one has its place, the default preparation is returned, with a warning.
    """
    uri = checkpoint.config.data.uri
    try:
        index = Index.load(open_storage(uri))
        if index.digest == checkpoint.position.index_digest:
            return index.preparation
        reason = "is another dataset now"
    except UserError as error:
        reason = f"cannot be read ({error})"
    options = default_preparation(checkpoint.config.model)
    logger.warning(
        "%s, on which the weights were trained, %s: scenes are prepared with the defaults, LR %s px and HR %s px",
        uri,
        reason,
        options.lr_size,
        options.hr_size,
    )
    return options


def default_preparation(model: ModelConfig) -> SampleOptions:
    """Return the default preparation with a model's bands and revisits."""
    return SampleOptions(bands="true_color" if model.bands == 3 else "all", revisits=model.revisits)
