"""Simulated revisits follow the published formulas, and depend on seed, epoch and chip alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import DataConfig, RunConfig, load_config
from pipeline.data import ChipDataset, TrainLoader, evaluation_batches
from pipeline.data.batches import collate
from pipeline.data.simulate import SIMULATORS, chip_generator, sensor_revisits, shifted_revisits
from pipeline.order import BatchPlan
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.errors import UserError
from tests.chips import training_chip
from tests.command import column, last_checkpoint

SIZES = [((156, 156), (50, 50)), ((61, 46), (19, 15)), ((24, 33), (12, 33))]
"""Sizes of target and revisit: the usual, one that 4 does not divide, and one that is enlarged."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def image(*size: int, seed: int = 0) -> Tensor:
    """Return an image [3, H, W] whose border matters, with values at both ends of the range."""
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)).square()


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> list[float]:
    return (low + (high - low) * torch.rand(count, dtype=torch.float64, generator=generator)).tolist()


def blurred(picture: Tensor, sigma: float, radius: int) -> Tensor:
    """Blur [C, H, W] along x, then along y."""
    taps = torch.tensor([math.exp(-k * k / (2 * sigma * sigma)) for k in range(-radius, radius + 1)]).double()
    taps /= taps.sum()
    padded = F.pad(picture[:, None], (radius, radius, radius, radius), mode="reflect")
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))[:, 0]


def sensor_one_by_one(target: Tensor, revisits: int, size: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Run the published steps in their order, revisit by revisit, with torch's own grid sampling and resizing."""
    tx, ty = uniform(revisits, -3, 3, draw), uniform(revisits, -3, 3, draw)
    sigmas = uniform(revisits, 1.5, 2.0, draw)
    n1 = torch.randn(revisits, len(target), *size, generator=draw)
    n2 = torch.randn(revisits, len(target), *size, generator=draw)
    height, width = target.shape[-2:]
    results = []
    for r in range(revisits):
        x = 2 * (torch.arange(width).double() - tx[r]) / (width - 1) - 1
        y = 2 * (torch.arange(height).double() - ty[r]) / (height - 1) - 1
        grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        moved = F.grid_sample(target.double()[None], grid[None], padding_mode="border", align_corners=True)[0]
        soft = blurred(moved, sigmas[r], max(1, int(3 * sigmas[r] + 0.5)))
        v = F.interpolate(F.avg_pool2d(soft, 4)[None], size, mode="bilinear")[0]
        v = v + n1[r] * (1000 * v).clamp(min=0).sqrt() / 1000
        results.append((v + 0.001 * n2[r]).clamp(0, 1))
    return torch.stack(results)


def shifts_one_by_one(target: Tensor, revisits: int, size: tuple[int, int], draw: torch.Generator) -> Tensor:
    (sigma,) = uniform(1, 0.1, 2.0, draw)
    small = F.interpolate(blurred(target.double(), sigma, 2)[None], size, mode="bilinear")[0]
    tx, ty = (torch.randint(-2, 3, (revisits,), generator=draw).tolist() for _ in "xy")
    noise = torch.randn(revisits, len(target), *size, generator=draw)
    factors = uniform(revisits, 0.9, 1.1, draw)
    height, width = size
    results = []
    for r in range(revisits):
        moved = torch.zeros_like(small)
        for y in range(height):
            for x in range(width):
                if 0 <= y - ty[r] < height and 0 <= x - tx[r] < width:
                    moved[:, y, x] = small[:, y - ty[r], x - tx[r]]
        noisy = (moved + noise[r] * moved.std(unbiased=True) * 0.03).clamp(0, 1)
        results.append((noisy * factors[r]).clamp(0, 1))
    return torch.stack(results)


@pytest.mark.parametrize(("target_size", "size"), SIZES)
@pytest.mark.parametrize(
    ("ours", "reference"), [(sensor_revisits, sensor_one_by_one), (shifted_revisits, shifts_one_by_one)]
)
def test_each_is_its_published_formula(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    target_size: tuple[int, int],
    size: tuple[int, int],
) -> None:
    for seed in range(3):
        target = image(*target_size, seed=seed)
        result = ours(target, 5, size, chip_generator(seed, 1, 2))
        assert result.dtype == torch.float32
        torch.testing.assert_close(
            result.double(), reference(target, 5, size, chip_generator(seed, 1, 2)), atol=1e-6, rtol=0
        )


def test_the_sensor_looks_from_anywhere_within_three_pixels() -> None:
    """A ramp's value gives the shift: content that moves right by t lowers it by t steps."""
    slope = 0.006
    ramp = (slope * torch.arange(156.0)).expand(3, 156, 156)
    across = sensor_revisits(ramp, 600, (50, 50), chip_generator(0, 0, 0))[..., 20:30].mean(dim=(1, 2, 3))
    down = sensor_revisits(ramp.mT, 600, (50, 50), chip_generator(0, 0, 1))[..., 20:30, :].mean(dim=(1, 2, 3))
    middle = slope * (25 * 156 / 50 - 0.5)
    for level in (across, down):
        shifts = (middle - level) / slope
        assert 2.8 < shifts.max() < 3.3
        assert -3.3 < shifts.min() < -2.8
        assert shifts.mean().abs() < 0.2
        assert shifts.std() == pytest.approx(6 / math.sqrt(12), rel=0.05)


@pytest.mark.parametrize("level", [0.0, 0.04, 0.5])
def test_shot_noise_grows_with_the_root_of_the_signal(level: float) -> None:
    flat = torch.full((3, 156, 156), level)
    seen = sensor_revisits(flat, 8, (50, 50), chip_generator(1, 0, 0))
    expected = math.hypot(math.sqrt(level / 1000), 0.001)
    if level:
        assert seen.std().item() == pytest.approx(expected, rel=0.02)
        assert seen.mean().item() == pytest.approx(level, abs=4 * expected / math.sqrt(seen.numel()))
    else:  # the clamp keeps the upper half
        assert seen.square().mean().sqrt().item() == pytest.approx(0.001 / math.sqrt(2), rel=0.02)


def test_shifts_move_by_up_to_two_pixels_and_change_brightness_by_a_tenth() -> None:
    target = torch.zeros(1, 30, 30)
    target[:, 14:17, 14:17] = 0.9
    seen = shifted_revisits(target, 2000, (30, 30), chip_generator(0, 0, 0))
    places = {divmod(int(place), 30) for place in F.avg_pool2d(seen, 3, 1, 1).flatten(1).argmax(dim=1)}
    assert places == {(15 + y, 15 + x) for y in range(-2, 3) for x in range(-2, 3)}
    flat = shifted_revisits(torch.full((3, 40, 40), 0.5), 2000, (40, 40), chip_generator(0, 0, 1))
    factors = flat[:, :, 10:30, 10:30].mean(dim=(1, 2, 3)) / 0.5
    assert factors.min() == pytest.approx(0.9, abs=0.003)
    assert factors.max() == pytest.approx(1.1, abs=0.003)
    assert factors.mean() == pytest.approx(1.0, abs=0.006)


@pytest.mark.parametrize("mode", SIMULATORS)
def test_chips_do_not_depend_on_order_threads_or_the_global_generator(mode: str) -> None:
    target = image(156, 156)

    def make(key: tuple[int, int, int]) -> Tensor:
        return SIMULATORS[mode](target, 8, (50, 50), chip_generator(*key))

    keys = [(3, 4, chip) for chip in range(6)] + [(4, 4, 0), (3, 5, 0)]
    alone = [make(key) for key in keys]
    state = torch.get_rng_state()
    torch.manual_seed(99)
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(make, reversed(keys)))
    torch.set_rng_state(state)
    for one, other in zip(alone, reversed(together), strict=True):
        assert torch.equal(one, other)
    assert len({one.sum().item() for one in alone}) == len(keys)


@pytest.mark.parametrize("mode", SIMULATORS)
def test_the_revisits_of_a_chip_are_made_from_the_chip_as_it_was_turned(mode: str, dataset_uri: str) -> None:
    config = DataConfig(simulate=mode, random_windows=True)
    dataset = ChipDataset(dataset_uri, "train", config)
    for chip in (0, 7, 20):
        batch = training_chip(dataset, chip, seed=5, epoch=2)
        made = SIMULATORS[mode](batch.hr[0], 8, (50, 50), chip_generator(5, 2, chip))
        assert torch.equal(batch.lr[0], made)
    plain = training_chip(ChipDataset(dataset_uri, "train", DataConfig(random_windows=True)), 20, seed=5, epoch=2)
    assert torch.equal(plain.hr, batch.hr)
    assert torch.equal(plain.pan, batch.pan)
    assert not torch.equal(plain.lr, batch.lr)


def test_batches_do_not_depend_on_ranks_threads_or_where_an_epoch_is_entered(dataset_uri: str) -> None:
    def batches(plan: BatchPlan, rank: int, threads: int, first: int = 0) -> list[Tensor]:
        dataset = ChipDataset(dataset_uri, "train", DataConfig(simulate="sensor", loader_threads=threads))
        return [batch.lr for batch in TrainLoader(dataset, plan, rank, 5).batches(1, first)]

    alone = batches(BatchPlan.create(8, 8, 1), 0, 1)
    parts = [batches(BatchPlan.create(8, 4, 2), rank, 3) for rank in (0, 1)]
    for whole, *halves in zip(alone, *parts, strict=True):
        assert torch.equal(torch.cat(halves), whole)
    for whole, again in zip(alone[2:], batches(BatchPlan.create(8, 8, 1), 0, 4, first=2), strict=True):
        assert torch.equal(again, whole)


def test_every_evaluation_sees_the_same_simulation(dataset_uri: str) -> None:
    dataset = ChipDataset(dataset_uri, "test", DataConfig(simulate="sensor"))
    first, second = (collate([batch for batch, _ in evaluation_batches(dataset)]) for _ in range(2))
    assert torch.equal(first.lr, second.lr)
    assert not torch.equal(first.lr, collate([plain_chip(dataset_uri, chip) for chip in range(9)]).lr)
    made = sensor_revisits(first.hr[3], 8, (50, 50), chip_generator(0, 0, 3))
    assert torch.equal(first.lr[3], made)


def plain_chip(uri: str, chip: int):
    return ChipDataset(uri, "test", DataConfig()).evaluation_batch(chip)


def test_an_unknown_simulation_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"data\.simulate = 'senser' is not known; did you mean 'sensor'"):
        load_config("srcnn_pnn", ["data.simulate=senser"])


@pytest.mark.parametrize("mode", SIMULATORS)
def test_training_is_the_same_with_any_number_of_loader_threads(
    mode: str, world: World, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    runs = []
    for threads in (1, 4):
        run = tmp_path / str(threads)
        run_training(make_config(run, f"data.simulate={mode}", f"data.loader_threads={threads}", "train.max_steps=3"))
        runs.append((column(run, "train/loss"), last_checkpoint(run).state.weights))
    (losses, weights), (others, other_weights) = runs
    assert len(losses) == 3
    assert losses == others
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    run_training(make_config(tmp_path / "off", "train.max_steps=1"))
    assert column(tmp_path / "off", "train/loss")[0] != losses[0]
    with pytest.raises(UserError, match=f"another data.simulate \\({mode}, now off\\)"):
        run_training(make_config(tmp_path / "1", "train.max_steps=4"))
