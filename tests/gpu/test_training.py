"""DeepSpeed on the GPU: the losses of the CPU, a state that passes between both, a step that waits for nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.registry import build_model
from pipeline.config import RunConfig
from pipeline.data import ChipDataset, TrainLoader
from pipeline.engines.engine import MOMENTS, TrainState
from pipeline.order import BatchPlan
from pipeline.quality.losses import fusion_loss
from pipeline.reporting.run_folder import RunFolder
from pipeline.training.checkpoint import newest_checkpoint
from pipeline.training.loop import Trainer
from pipeline.training.schedule import learning_rate
from pipeline.world import World
from sharding.storage import open_storage
from tests.command import column
from tests.gpu import children

pytestmark = pytest.mark.gpu

MakeRun = Callable[..., RunConfig]
CPU = torch.device("cpu")
STEPS = 20


def plain_losses(config: RunConfig) -> list[float]:
    """Return the losses of a run on the CPU, of a loop that has no DeepSpeed in it."""
    plan = BatchPlan.create(config.train.global_batch, 0, 1)
    loader = TrainLoader(ChipDataset(config.data.uri, "train", config.data), plan, 0, config.train.seed)
    torch.manual_seed(config.train.seed)
    network = build_model(config.model).train()
    adam = torch.optim.Adam(network.parameters(), weight_decay=config.train.weight_decay)
    losses = []
    while len(losses) < STEPS:
        for batch in itertools.islice(loader, STEPS - len(losses)):
            rate = learning_rate(len(losses) + 1, loader.steps_per_epoch, STEPS, config.train)
            adam.param_groups[0]["lr"] = rate
            network.at_step(len(losses))
            loss = fusion_loss(network(batch.lr, batch.pan, batch.revisit), batch.hr, config.loss).total.mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def expected_losses(tiny_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return plain_losses(tiny_run(tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("stage", range(4))
def test_twenty_steps_at_zero_stage(
    stage: int,
    device: torch.device,
    tiny_run: MakeRun,
    expected_losses: list[float],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    run = tmp_path / "run"
    children.run(device, "train", tiny_run(run, f"train.zero_stage={stage}", f"train.max_steps={STEPS}"))
    losses = [float(loss) for loss in column(run, "train/loss")]
    assert len(losses) == STEPS
    record_property("relative_error", max(abs(a - b) / abs(b) for a, b in zip(losses, expected_losses, strict=True)))
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def carried(device: torch.device, tiny_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder: ``cpu`` has three steps of a run on the CPU, ``gpu-<stage>`` and ``back-<stage>`` its state."""
    folder = tmp_path_factory.mktemp("carried")
    config = tiny_run(folder / "cpu", "train.max_steps=3")
    children.run(CPU, "train", config)
    children.run(device, "carry", config, folder / "cpu", folder / "gpu")
    children.run(CPU, "carry", config, folder / "gpu", folder / "back")
    return folder


@pytest.mark.parametrize("stage", range(4))
def test_a_checkpoint_goes_from_cpu_to_gpu_and_back(stage: int, carried: Path) -> None:
    def state(name: str) -> TrainState:
        checkpoint = newest_checkpoint(open_storage(carried / name))
        assert checkpoint is not None
        return checkpoint.state

    first = state("cpu")
    assert first.step == 3
    for other in (state(f"gpu-{stage}"), state(f"back-{stage}")):
        assert other.step == 3
        assert other.weights.keys() == first.weights.keys()
        assert all(torch.equal(other.weights[name], value) for name, value in first.weights.items())
        assert other.moments.keys() == first.moments.keys()
        for name, moments in first.moments.items():
            assert all(torch.equal(other.moments[name][moment], moments[moment]) for moment in MOMENTS), name
    assert any(moments["exp_avg"].any() for moments in first.moments.values())


def test_a_step_at_zero_stage_0_waits_for_nothing(tiny_run: MakeRun, world: World, tmp_path: Path) -> None:
    """Three steps while every synchronisation of host and GPU raises; batches are there before, logs come after."""
    config = tiny_run(tmp_path / "run", "train.log_batches=false")
    plan = BatchPlan.create(config.train.global_batch, config.train.micro_batch, world.size)
    dataset = ChipDataset(config.data.uri, "train", config.data)
    with RunFolder(config.output.uri, 0) as run:
        trainer = Trainer(config, world, plan, dataset, dataset.sibling("val"), run, None)
        batches = list(itertools.islice(trainer.loader, 5))
        for batch in batches[:2]:
            trainer.train_step(batch, 0)
        before = trainer.engine.state(2, moments=False, keep=True).weights
        if world.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches[2:]:
                trainer.train_step(batch, 0)
        finally:
            if world.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        after = trainer.engine.state(5, moments=False, keep=True)
        after.wait()
    assert any(not torch.equal(after.weights[name], value) for name, value in before.items())
