"""Activation checkpointing gives the same steps and keeps fewer activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.registry import build_model
from pipeline.config import RunConfig, TrainConfig
from pipeline.engines.make import make_engine
from pipeline.engines.recompute import _blocks, recompute_blocks
from pipeline.order import BatchPlan
from pipeline.quality.losses import LossConfig
from pipeline.world import World
from sharding.errors import UserError
from tests.pipeline.engines.test_engine import Kind, options, random_batch, take_step

STAGES = {
    ("srcnn", "none"): 3,
    ("highresnet", "none"): 2,
    ("rams", "none"): 2,
    ("trnet", "none"): 1,
    ("trnet_pan", "none"): 2,
    ("none", "pnn"): 0,
    ("none", "pannet"): 2,
    ("none", "innformer"): 5,
    ("none", "u2net"): 13,
    ("none", "pan_mamba"): 30,
}
"""Blocks of each encoder and head that recompute."""


@pytest.mark.parametrize(("encoder", "head"), STAGES)
def test_gradients_are_equal_bit_for_bit(encoder: str, head: str) -> None:
    torch.manual_seed(0)
    network = build_model(ModelConfig(encoder, head, hidden=8, revisits=3, dropout="published"))
    lr, pan = torch.rand(1, 3, 3, 16, 16), torch.rand(1, 1, 50, 50)

    def gradients() -> dict[str, Tensor]:
        network.zero_grad()
        torch.manual_seed(1)
        network(lr, pan).fused.square().sum().backward()
        return {name: value.grad for name, value in network.named_parameters() if value.grad is not None}

    before = gradients()
    assert recompute_blocks(network) == STAGES[encoder, head]
    after = gradients()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_blocks_keep_no_activations_for_the_backward_pass() -> None:
    network = build_model(ModelConfig("none", "pannet", hidden=8))
    lr, pan = torch.rand(1, 8, 3, 16, 16), torch.rand(1, 1, 50, 50)

    def kept() -> int:
        """Return the number of activations of 64 channels, which only the blocks and the first convolution have."""
        found: set[int] = set()

        def keep(tensor: Tensor) -> Tensor:
            if tensor.shape == (1, 64, 50, 50):
                found.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            fused = network(lr, pan).fused
        fused.sum().backward()
        return len(found)

    assert kept() == 3  # the first convolution's, the first block's after each of its two
    recompute_blocks(network)
    assert kept() == 2  # the inputs of the two blocks


@pytest.mark.parametrize("kind", [0, 1, 2, 3, "torch"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_of_an_engine_are_equal_bit_for_bit(kind: Kind, precision: str, world: World) -> None:
    losses, passes = {}, {}
    for recompute in (False, True):
        config = TrainConfig(**options(kind), precision=precision, global_batch=4, recompute=recompute)
        torch.manual_seed(0)
        network = build_model(ModelConfig("highresnet", "pannet", hidden=8))
        inside = [next(block.children()) for stage in (network.encoder, network.head) for block in _blocks(stage)]
        counted = count_passes(inside)
        engine = make_engine(network, config, BatchPlan.create(4, 2, 1), world)
        losses[recompute] = [take_step(engine, random_batch(step), 2, 1e-3, LossConfig()) for step in range(3)]
        passes[recompute] = dict(counted)
    assert losses[True] == losses[False]
    # Each block computes again in the backward pass.
    assert passes[True] == {number: 2 * count for number, count in passes[False].items()}
    assert len(passes[True]) == STAGES["highresnet", "none"] + STAGES["none", "pannet"]


def count_passes(modules: Sequence[nn.Module]) -> Counter[int]:
    """Return the forward passes of each module from now on, by its number."""
    passes: Counter[int] = Counter()
    for number, module in enumerate(modules):
        module.register_forward_pre_hook(lambda _, __, number=number: passes.update([number]))
    return passes


@pytest.mark.parametrize(("head", "told"), [("pnn", True), ("pannet", False)])
def test_recompute_without_blocks_is_told(
    head: str, told: bool, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig(**options("torch"), global_batch=4, recompute=True)
    make_engine(build_model(ModelConfig("none", head, hidden=8)), config, BatchPlan.create(4, 2, 1), world)
    assert ("train.recompute = true saves nothing" in caplog.text) == told


def test_what_cannot_recompute_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.recompute"):
        TrainConfig(recompute=True, compile=True)
    with pytest.raises(UserError, match=r"train\.recompute.*ARConv"):
        RunConfig(model=ModelConfig("none", "arconv"), train=TrainConfig(recompute=True))
