"""Training steps that `benchmarks.step` compares: those of our engines, and that of the published code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from models.config import ModelConfig
from models.registry import build_model, parse_pair
from pipeline.config import TrainConfig
from pipeline.data.batches import Batch
from pipeline.engines.engine import compiled, use_tf32
from pipeline.engines.make import make_engine
from pipeline.order import BatchPlan
from pipeline.quality.losses import LossConfig, fusion_loss
from pipeline.world import World

LR, HR = 50, 156
PHASES = ("forward", "loss", "backward", "optimizer")
SETTLED = 10**9
"""A step at which ARConv's kernels are frozen, because compilation requires it."""


class Contender(Protocol):
    """One training step in phases, which are called in their order."""

    def forward(self) -> None: ...
    def loss(self) -> None: ...
    def backward(self) -> None: ...
    def optimizer(self) -> None: ...


def random_batch(size: int, revisits: int, bands: int, device: torch.device) -> Batch:
    """Return chips of WorldStrat's shape with random reflectances."""
    generator = torch.Generator().manual_seed(0)

    def image(*shape: int) -> Tensor:
        return torch.rand(size, *shape, generator=generator).to(device)

    return Batch(
        lr=image(revisits, bands, LR, LR),
        pan=image(1, HR, HR),
        hr=image(bands, HR, HR),
        revisit=torch.zeros(size, dtype=torch.long, device=device),
        weight=torch.ones(size, device=device),
        chips=tuple(range(size)),
    )


class Ours:
    """A step of one of our engines."""

    def __init__(self, name: str, model: ModelConfig, batch: Batch, precision: str, world: World) -> None:
        """Build network and engine.

        Args:
            name: ``deepspeed`` or ``torch``, then options after colons: ``zero1`` to ``zero3``, ``channels_last``,
                ``compile``, ``tf32``.
            model: The network.
            batch: Batch of each step.
            precision: ``fp32`` or ``bf16``.
            world: This process's place.
        """
        engine, *options = name.split(":")
        flags = {option: True for option in options if not option.startswith("zero")}
        stage = next((int(option.removeprefix("zero")) for option in options if option.startswith("zero")), 0)
        size = len(batch.chips)
        config = TrainConfig(engine=engine, precision=precision, zero_stage=stage, global_batch=size, **flags)
        use_tf32(config.tf32)
        torch.manual_seed(0)
        network = build_model(model).to(world.device)
        self.batch, self.config = batch, LossConfig()
        self.engine = make_engine(network, config, BatchPlan.create(size, 0, world.size), world)
        self._loss: Callable[..., object] = fusion_loss
        if config.compile:
            self._loss = compiled(fusion_loss)
        self._compiled, self._taken = config.compile, 0

    def forward(self) -> None:
        # The first step chooses ARConv's kernels; they can be frozen only after it.
        self.engine.begin_step(SETTLED if self._compiled and self._taken else 0)
        self.images = self.engine.forward(self.batch)

    def loss(self) -> None:
        self.value = self._loss(self.images, self.batch.hr, self.config).total.mean()

    def backward(self) -> None:
        self.engine.backward(self.value)

    def optimizer(self) -> None:
        self.engine.update(1e-4)
        self._taken += 1


class Published:
    """A step of the published code, from a folder that the user names; this file holds none of it."""

    def __init__(self, folder: Path, encoder: str, head: str, batch: Batch, precision: str) -> None:
        """Build the published network."""
        from benchmarks import published

        published.enable(folder)
        self._published = published
        self.batch, self._bf16 = batch, precision == "bf16"
        self.network = published.build(encoder, head).to(batch.lr.device)
        self._adam = published.optimizer(self.network)

    def forward(self) -> None:
        with torch.autocast(self.batch.lr.device.type, torch.bfloat16, enabled=self._bf16):
            self.fused = self.network(self.batch.lr, self.batch.pan)

    def loss(self) -> None:
        self.value = self._published.training_loss(self.fused.float(), self.batch.hr)

    def backward(self) -> None:
        self._adam.zero_grad(set_to_none=True)
        self.value.backward()

    def optimizer(self) -> None:
        self._adam.step()


def model_config(pair: str, width: int) -> ModelConfig:
    """Return the model of ``encoder+head`` with this number of features; 128 is the published width."""
    encoder, head = parse_pair(pair)
    return ModelConfig(encoder, head, hidden=width)
