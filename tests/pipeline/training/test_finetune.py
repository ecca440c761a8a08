"""Fine-tuning: a run starts from given weights, freezes a stage, trains stages at their own rates, and averages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.config import ModelConfig
from models.published import to_published
from models.registry import build_model
from models.satfusion import SatFusion
from pipeline.config import RunConfig, TrainConfig
from pipeline.engines.engine import TrainState
from pipeline.engines.make import make_engine
from pipeline.order import BatchPlan
from pipeline.quality.losses import LossConfig
from pipeline.training.average import WeightAverage
from pipeline.training.initial import load_initial
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.errors import UserError
from tests.command import column, last_checkpoint
from tests.pipeline.engines.test_engine import KINDS, Kind, options, random_batch, take_step

MakeConfig = Callable[..., RunConfig]
MODEL = ModelConfig("rams", "pannet", hidden=8)
PLAN = BatchPlan.create(4, 4, 1)


def network(seed: int = 0) -> SatFusion:
    torch.manual_seed(seed)
    return build_model(MODEL)


@pytest.mark.parametrize("stage", ["encoder", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_stage_keeps_its_bytes(kind: Kind, stage: str, world: World) -> None:
    model = network()
    model.freeze(stage)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = make_engine(model, TrainConfig(**options(kind), global_batch=4, weight_decay=0.1), PLAN, world)
    for step in range(3):
        take_step(engine, random_batch(step), 4, 1e-3, LossConfig())
    after = engine.state(3)
    frozen = ("encoder.", "upsampler.") if stage == "encoder" else ("head.",)
    for name, value in before.items():
        assert torch.equal(value, after.weights[name]) == name.startswith(frozen), name
    assert not any(name.startswith(frozen) for name in after.moments)

    again = network(seed=1)
    again.freeze(stage)
    resumed = make_engine(again, TrainConfig(**options(kind), global_batch=4, weight_decay=0.1), PLAN, world, after)
    loss = take_step(engine, random_batch(3), 4, 1e-3, LossConfig())
    assert take_step(resumed, random_batch(3), 4, 1e-3, LossConfig()) == loss


def test_norms_and_dropout_of_a_frozen_stage_stay_in_evaluation() -> None:
    model = network()
    model.freeze("encoder")
    model.train()
    assert not any(part.training for part in (*model.encoder.modules(), *model.upsampler.modules()))
    assert all(part.training for part in model.head.modules())


@pytest.mark.parametrize("kind", [0, 2, 3, "torch"])
def test_stages_train_at_their_own_rates(kind: Kind, world: World) -> None:
    """Adam's first step is the learning rate for nearly every weight."""

    def moved(rates: dict[str, float]) -> dict[str, float]:
        engine = make_engine(network(), TrainConfig(**options(kind), global_batch=4, **rates), PLAN, world)
        before = engine.state(0, moments=False).weights
        take_step(engine, random_batch(0), 4, 1e-3, LossConfig())
        after = engine.state(1, moments=False).weights
        largest: dict[str, float] = {}
        for name, _ in network().named_parameters():
            stage = name.partition(".")[0]
            largest[stage] = max(largest.get(stage, 0), (after[name] - before[name]).abs().max().item())
        return largest

    found = moved({"encoder_rate": 0.1, "head_rate": 4.0})
    assert found == pytest.approx({"encoder": 1e-4, "upsampler": 1e-4, "head": 4e-3, "refinement": 1e-3}, rel=2e-2)


def test_the_average_follows_its_definition_and_resumes() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    values = [3.0, 5.0, 7.0]
    with torch.no_grad():
        layer.weight.fill_(1.0)
    average, expected = WeightAverage(layer, 0.3, {}), 1.0
    for step, value in enumerate(values, 1):
        with torch.no_grad():
            layer.weight.fill_(value)
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    kept = average.state()
    assert kept["weight"].item() == pytest.approx(expected)
    with average.applied():
        assert layer.weight.item() == pytest.approx(expected)
    assert layer.weight.item() == 7.0
    assert torch.equal(WeightAverage(layer, 0.3, kept).state()["weight"], kept["weight"])


def test_a_run_starts_from_the_best_weights_of_another(world: World, make_config: MakeConfig, tmp_path: Path) -> None:
    first = tmp_path / "first"
    trained = run_training(make_config(first, "train.max_steps=9"))
    tuned = tmp_path / "tuned"
    config = make_config(tuned, "train.max_steps=4", f"train.init={first}", "train.freeze=encoder", "train.ema=0.9")
    found = run_training(config)
    # The validation before the first step is that of the weights it starts from.
    assert found.best_loss <= trained.best_loss
    ours, theirs = last_checkpoint(tuned).state, last_checkpoint(first).state
    same = [name for name in theirs.weights if torch.equal(theirs.weights[name], ours.weights[name])]
    assert {name.partition(".")[0] for name in same} >= {"encoder", "upsampler"}
    assert len(same) < len(theirs.weights)
    assert ours.ema.keys() == {name for name, _ in build_model(config.model).named_parameters()}
    assert column(tuned, "step") == ["1", "2", "3", "4"]
    with pytest.raises(UserError, match=r"another train\.freeze"):
        run_training(make_config(tuned, "train.max_steps=9", f"train.init={first}", "train.ema=0.9"))


def test_a_resumed_average_is_the_undisturbed_one(world: World, make_config: MakeConfig, tmp_path: Path) -> None:
    def averages(folder: str, *steps: int) -> TrainState:
        for last in steps:
            same = ("train.ema=0.9", "train.schedule=warm_restarts", "train.checkpoint_every=3")
            run_training(make_config(tmp_path / folder, *same, f"train.max_steps={last}"))
        return last_checkpoint(tmp_path / folder).state

    whole, parts = averages("whole", 6), averages("parts", 3, 6)
    assert all(torch.equal(value, parts.ema[name]) for name, value in whole.ema.items())


def test_parameters_without_counterpart_start_fresh_and_are_named(
    world: World, make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path / "first", "train.max_steps=2")
    run_training(config)
    wider = build_model(replace(config.model, head="pannet"))
    caplog.set_level("INFO")
    load_initial(wider, TrainConfig(init=config.output.uri, init_checkpoint="last"))
    weights = last_checkpoint(tmp_path / "first").state.weights
    assert all(torch.equal(value, weights[f"encoder.{name}"]) for name, value in wider.encoder.state_dict().items())
    assert "these start fresh: head." in caplog.text
    with pytest.raises(UserError, match="no parameter of best-2 has the name and shape"):
        load_initial(build_model(ModelConfig("none", "u2net")), TrainConfig(init=config.output.uri))


def test_a_run_starts_from_a_published_checkpoint(tmp_path: Path) -> None:
    theirs = build_model(ModelConfig("srcnn", "pnn", published=True))
    file = tmp_path / "published.ckpt"
    torch.save({"state_dict": {f"backbone.{name}": value for name, value in to_published(theirs).items()}}, file)
    ours = build_model(ModelConfig("srcnn", "pnn"))
    load_initial(ours, TrainConfig(init=str(file)))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    with pytest.raises(UserError, match=r"train\.init = .* does not fit this model"):
        load_initial(build_model(ModelConfig("srcnn", "pannet")), TrainConfig(init=str(file)))


def test_invalid_keys_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    for key, words in (
        ("train.freeze=encodr", "encoder"),
        ("train.ema=1.0", "below 1"),
        ("train.head_rate=0.0", "above 0"),
    ):
        with pytest.raises(UserError, match=words):
            make_config(tmp_path, key)
    with pytest.raises(UserError, match="0 with ZeRO 3"):
        make_config(tmp_path, "train.ema=0.9", "train.zero_stage=3")
    with pytest.raises(UserError, match="empty for a model of one stage"):
        make_config(tmp_path, "train.freeze=head", "train.init=x", "model.encoder=none")
    with pytest.raises(UserError, match=r"empty without train\.init"):
        make_config(tmp_path, "train.freeze=head")
