"""The choice between the engines."""

from __future__ import annotations

from models.satfusion import SatFusion
from pipeline.config import TrainConfig
from pipeline.engines.deepspeed_engine import DeepSpeedEngine
from pipeline.engines.engine import Engine, TrainState
from pipeline.engines.torch_engine import TorchEngine
from pipeline.order import BatchPlan
from pipeline.world import World


def make_engine(
    network: SatFusion, config: TrainConfig, plan: BatchPlan, world: World, state: TrainState | None = None
) -> Engine:
    """Return the engine that ``train.engine`` names.

    Args:
        network: The SatFusion network; every rank's weights must be equal. It is changed in place.
        config: Engine, optimizer, precision, clipping and ZeRO stage.
        plan: Micro-batch and accumulation.
        world: This process's place.
        state: Weights and moments to resume from.
    """
    kind = TorchEngine if config.engine == "torch" else DeepSpeedEngine
    return kind(network, config, plan, world, state)
