"""The choice between the engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.satfusion import SatFusion
from pipeline.config import TrainConfig
from pipeline.engines.deepspeed_engine import DeepSpeedEngine
from pipeline.engines.engine import Engine, TrainState
from pipeline.engines.torch_engine import TorchEngine
from pipeline.order import BatchPlan
from pipeline.world import World


def make_engine(
    network: SatFusion,
    config: TrainConfig,
    plan: BatchPlan,
    world: World,
    state: TrainState | None = None,
    keys: Mapping[str, Any] | None = None,
) -> Engine:
    """Return the engine that ``train.engine`` names.

    Args:
        network: The SatFusion network; every rank's weights must be equal. It is changed in place.
        config: Engine, optimizer, precision, clipping and ZeRO stage.
        plan: Micro-batch and accumulation.
        world: This process's place.
        state: Weights and moments to resume from.
        keys: A user's own keys of DeepSpeed (`RunConfig.deepspeed`).
    """
    if config.engine == "torch":
        return TorchEngine(network, config, plan, world, state)
    return DeepSpeedEngine(network, config, plan, world, state, keys)
