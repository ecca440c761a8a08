"""Real runs over a bad network and over damaged samples: the same steps, and the mean over the counted chips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from models.config import ModelConfig
from models.registry import ENCODERS, HEADS, build_model
from pipeline.config import RunConfig
from pipeline.data import ChipDataset, TrainLoader
from pipeline.data.batches import Batch, StoredBatch, to_batch
from pipeline.data.chips import ChipLayout, Variant, make_window
from pipeline.data.dataset import CPU
from pipeline.evaluation.evaluate import EvaluateOptions, evaluate_run
from pipeline.order import CHIPS_PER_SCENE, BatchPlan, rank_slots
from pipeline.quality.losses import PLACEMENTS, LossConfig, fusion_loss
from pipeline.quality.registration import MODES
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.errors import UserError
from sharding.format.index import Index
from sharding.storage import open_storage, retries
from tests.command import column, last_checkpoint
from tests.conftest import S3
from tests.distributed import Rank, run_ranks
from tests.faults import FaultProxy, Faults
from tests.pipeline.data.test_data import copy_to

MakeConfig = Callable[..., RunConfig]
BATCH = 6


@pytest.fixture(scope="module")
def make_small(make_config: MakeConfig, shards: dict[int, str]) -> MakeConfig:
    """Return the tiny run on the five small scenes."""

    def make(output: Path, *overrides: str) -> RunConfig:
        small = (f"data.uri={shards[3]}", f"train.global_batch={BATCH}")
        return make_config(output, *small, *overrides)

    return make


def scalars(folder: Path, tag: str) -> list[float]:
    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars(tag)]


@pytest.fixture
def busy(s3: S3, shards: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the small scenes in a slow store that rejects every third request."""
    uri = s3.prefix()
    copy_to(shards[3], uri)
    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"], Faults(busy=0.3, bytes_per_s=4e6), seed=2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr(retries, "LONGEST_PAUSE_S", 0.2)
        yield uri
        assert proxy.done("busy")


def test_a_run_over_a_busy_store_takes_the_same_steps_and_shows_what_it_cost(
    world: World, make_small: MakeConfig, busy: str, tmp_path: Path
) -> None:
    quiet, disturbed = tmp_path / "quiet", tmp_path / "disturbed"
    run_training(make_small(quiet, "train.max_steps=5"))
    run_training(make_small(disturbed, "train.max_steps=5", f"data.uri={busy}"))
    for name in ("train/loss", "val/loss"):
        assert column(disturbed, name) == column(quiet, name)
    assert column(disturbed, "chips", "batches.csv") == column(quiet, "chips", "batches.csv")
    tried = [float(value) for value in column(disturbed, "data/retries")]
    assert tried[-1] > float(column(quiet, "data/retries")[-1])
    assert set(column(disturbed, "store/retries")) == {"0.0"}  # the run folder is on this machine's disk
    assert max(float(wait) for wait in column(disturbed, "time/data_wait_seconds")) > 0
    for folder in ("rank-0", "aggregate"):
        assert scalars(disturbed / "events" / folder, "data/retries") == tried
        for tag in ("data/retries", "data/read_again", "data/quarantined_chips", "time/data_wait_seconds"):
            assert len(scalars(disturbed / "events" / folder, tag)) == 5


def damage(uri: str, target: Path, samples: Sequence[int], split: str = "train") -> str:
    """Copy a dataset and damage some of its samples."""
    copy_to(uri, str(target))
    places = Index.load(open_storage(target)).samples(split)
    for shard, entry in (places[sample] for sample in samples):
        path = target / shard.name
        data = bytearray(path.read_bytes())
        data[entry.offset + entry.size // 2] ^= 1
        path.write_bytes(data)
    return str(target)


def uneven(config: RunConfig) -> int:
    """Return a training sample of whose chips in the first global batch two ranks have different numbers."""
    loader = TrainLoader(
        ChipDataset(config.data.uri, "train", config.data), BatchPlan.create(BATCH, 0, 1), 0, config.train.seed
    )
    halves = rank_slots(loader.order(0)[0].reshape(2, -1), BatchPlan.create(BATCH, 0, 2), 0) // CHIPS_PER_SCENE
    counts = {sample: [(half == sample).sum() for half in halves] for sample in halves.ravel().tolist()}
    return max(counts, key=lambda sample: abs(counts[sample][0] - counts[sample][1]))


def by_hand(config: RunConfig) -> tuple[float, dict[str, Tensor], Batch]:
    """Return the mean loss over the counted chips of the first global batch, and its gradient."""
    dataset = ChipDataset(config.data.uri, "train", config.data)
    batch = next(TrainLoader(dataset, BatchPlan.create(BATCH, 0, 1), 0, config.train.seed).batches(0))
    torch.manual_seed(config.train.seed)
    network = build_model(config.model).train()
    counting = [chip for chip in batch.split(1) if chip.weight]
    mean = 0.0
    for chip in counting:
        loss = fusion_loss(network(chip.lr, chip.pan, chip.revisit), chip.hr, config.loss).total / len(counting)
        loss.backward()
        mean += loss.item()
    return mean, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}, batch


def train_and_refuse(place: Rank, quarantining: RunConfig, hopeless: RunConfig) -> str:
    """Train with one damaged sample, then with all damaged; return the error message."""
    run_training(quarantining)
    with pytest.raises(UserError) as told:
        run_training(hopeless)
    return str(told.value)


@pytest.mark.distributed
def test_a_quarantined_sample_counts_nothing_on_any_number_of_ranks(
    world: World, make_small: MakeConfig, shards: dict[int, str], tmp_path: Path
) -> None:
    options = ("data.damaged=quarantine", "train.weight_decay=0", "train.max_steps=1", "train.micro_batch=1")
    sample = uneven(make_small(tmp_path))
    uri = damage(shards[3], tmp_path / "damaged", [sample])
    alone, pair = (make_small(tmp_path / name, *options, f"data.uri={uri}") for name in ("alone", "pair"))
    nothing = damage(shards[3], tmp_path / "nothing", range(5))
    hopeless = make_small(tmp_path / "hopeless", *options, f"data.uri={nothing}")

    loss, gradient, batch = by_hand(alone)
    left_out = (batch.weight == 0).reshape(2, -1).sum(1).tolist()
    assert left_out[0] != left_out[1]
    assert 0 < sum(left_out) < BATCH
    norm = torch.nn.utils.get_total_norm(list(gradient.values())).item()

    run_training(alone)
    refused = run_ranks(train_and_refuse, 2, tmp_path / "ranks", pair, hopeless)
    for run in (Path(config.output.uri) for config in (alone, pair)):
        assert float(column(run, "train/loss")[0]) == pytest.approx(loss, rel=1e-6)
        assert float(column(run, "train/grad_norm")[0]) == pytest.approx(norm, rel=1e-6)
        moments = last_checkpoint(run).state.moments
        for name, value in gradient.items():  # the first of Adam's moments is a tenth of it
            assert (moments[name]["exp_avg"] * 10 - value).abs().max() <= 1e-6 * norm, name
        ranks = 1 if run.name == "alone" else 2
        assert float(column(run, "data/read_again")[0]) == ranks  # the scene's chips are on both ranks
        assert float(column(run, "data/quarantined_chips")[0]) == sum(left_out)
        assert scalars(run / "events" / "aggregate", "data/quarantined_chips") == [sum(left_out)]
    own, theirs = (last_checkpoint(Path(config.output.uri)).state.weights for config in (alone, pair))
    assert max((own[name] - theirs[name]).abs().max() for name in own) <= 1e-6
    for sentence in refused:
        assert sentence.startswith("every chip of global batch 1 is quarantined or without data: repair the dataset")


@pytest.fixture(scope="module")
def run(world: World, make_small: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run one step and evaluate the undamaged chips."""
    folder = tmp_path_factory.mktemp("run")
    run_training(make_small(folder, "data.damaged=quarantine", "train.max_steps=1"))
    return folder


def test_evaluation_leaves_quarantined_chips_out_and_says_so(
    run: Path, shards: dict[int, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = evaluate_run(str(run), "train", "last", options=EvaluateOptions(panels=0)).chips
    damaged = damage(shards[3], tmp_path / "damaged", [3])
    lost = Index.load(open_storage(damaged)).samples("train")[3][1].aoi
    caplog.clear()
    result = evaluate_run(str(run), "train", "last", data_uri=damaged, options=EvaluateOptions(panels=0))
    assert result.chips == [row for row in whole if row["aoi"] != lost]
    assert len(result.chips) == 4 * CHIPS_PER_SCENE * len(result.methods)
    assert "36 chips" in result.table()
    for chip in range(CHIPS_PER_SCENE):
        assert f"skipped in the metrics: {lost}/{chip} is quarantined" in caplog.text


def test_a_split_that_is_quarantined_whole_is_refused(
    run: Path, world: World, make_small: MakeConfig, shards: dict[int, str], tmp_path: Path
) -> None:
    nothing = damage(shards[3], tmp_path / "nothing", range(5))
    with pytest.raises(UserError, match=r"every chip of split 'train' of .+ is quarantined"):
        evaluate_run(str(run), "train", "last", data_uri=nothing, options=EvaluateOptions(panels=0))


def test_a_validation_that_is_quarantined_whole_is_refused(
    world: World, make_small: MakeConfig, shards: dict[int, str], tmp_path: Path
) -> None:
    uri = damage(shards[3], tmp_path / "damaged", [0], split="val")
    config = make_small(tmp_path / "run", "data.damaged=quarantine", "train.max_steps=1", f"data.uri={uri}")
    with pytest.raises(UserError, match=r"split 'val' of .+ is empty or quarantined whole"):
        run_training(config)


LOSSES = {
    f"{placement}-{registration}{'-adjusted' * bias_adjust}": LossConfig(
        placement=placement, registration=registration, bias_adjust=bias_adjust
    )
    for placement in PLACEMENTS
    for registration in MODES
    for bias_adjust in (False, True)
}


@pytest.mark.parametrize(
    ("encoder", "head", "loss"),
    [
        *(("srcnn", "pnn", loss) for loss in LOSSES),
        *((encoder, "none", "fused-centred") for encoder in ENCODERS),
        *(("none", head, "fused-centred") for head in HEADS),
    ],
)
def test_blank_chips_have_gradients_that_weigh_nothing(encoder: str, head: str, loss: str) -> None:
    """Zero times a value that is not finite would not be finite."""
    torch.manual_seed(0)
    network = build_model(ModelConfig(encoder, head, hidden=8, revisits=2)).train()
    blank = ChipLayout((2, 3, 16, 16), (3, 50, 50), torch.uint16, 3e-5)
    stored = StoredBatch(blank, 1)
    stored.begin([0], [Variant(make_window(0, 0, 3.125), 0, False, 1)])
    stored.put(0, None)
    batch = to_batch(stored, CPU, "off", (0, 0))
    parts = fusion_loss(network(batch.lr, batch.pan, batch.revisit), batch.hr, LOSSES[loss])
    assert parts.total.isfinite().all()
    (parts.total * batch.weight).sum().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
