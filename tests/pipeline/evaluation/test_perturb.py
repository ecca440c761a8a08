"""Perturbed inputs: right sizes of the perturbations, and the same for every level and network."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.batches import Batch
from pipeline.evaluation.perturb import KINDS, LEVELS, Kind, levels, perturb, unperturbed
from tests.pipeline.evaluation.batches import make_batch


def chip(revisits: int = 4, revisit: int = 2, side: int = 40) -> Batch:
    random = torch.Generator().manual_seed(3)
    lr = torch.rand(1, revisits, 3, side, side, generator=random)
    return make_batch(lr, torch.rand(1, 1, 80, 80), torch.rand(1, 3, 80, 80), revisit)


def test_noise_has_the_deviation_of_its_level_and_no_more_draws() -> None:
    batch = chip(8)
    low, high = (perturb(batch, "noise", level).lr - batch.lr for level in (0.01, 0.04))
    assert low.std().item() == pytest.approx(0.01, rel=0.02)
    torch.testing.assert_close(high, 4 * low, rtol=1e-3, atol=1e-5)


def test_blur_keeps_the_mean_of_a_wave_and_takes_its_height() -> None:
    batch = chip()
    wave = torch.sin(2 * torch.pi * torch.arange(40) / 8).expand(1, 4, 3, 40, 40)
    blurred = perturb(make_batch(0.5 + wave, batch.pan, batch.hr), "blur", 1.5).lr - 0.5
    gain = torch.exp(torch.tensor(-2 * (torch.pi * 1.5 / 8) ** 2)).item()
    assert blurred[..., 10:30].max().item() == pytest.approx(gain, rel=0.03)


def test_shifts_are_within_their_level_and_differ_between_revisits() -> None:
    ramp = torch.arange(40.0).expand(1, 4, 3, 40, 40)
    batch = make_batch(ramp, torch.rand(1, 1, 80, 80), torch.rand(1, 3, 80, 80))
    moves = (perturb(batch, "shift", 2.0).lr - ramp)[0, :, 0, 20, 20]
    halves = (perturb(batch, "shift", 1.0).lr - ramp)[0, :, 0, 20, 20]
    assert moves.abs().max() <= 2
    assert len({round(move, 3) for move in moves.tolist()}) == 4
    torch.testing.assert_close(moves, 2 * halves, rtol=1e-4, atol=1e-4)


def test_fewer_revisits_are_the_clearest_and_the_first_repeated() -> None:
    batch = chip()
    two = perturb(batch, "revisits", 2.0)
    assert torch.equal(two.lr, batch.lr[:, [0, 2, 0, 2]])
    assert two.revisit.tolist() == [1]
    assert torch.equal(perturb(batch, "revisits", 1.0).lr, batch.lr[:, [2, 2, 2, 2]])
    assert levels("revisits", 8) == (4, 2, 1)
    assert levels("revisits", 1) == ()


@pytest.mark.parametrize("kind", KINDS)
def test_pan_and_target_stay_and_so_do_the_sizes(kind: Kind) -> None:
    batch = chip()
    for level in LEVELS.get(kind, (2.0,)):
        moved = perturb(batch, kind, level)
        assert moved.lr.shape == batch.lr.shape
        assert moved.lr.dtype == torch.float32
        assert not torch.equal(moved.lr, batch.lr)
        assert moved.pan is batch.pan
        assert moved.hr is batch.hr
    if kind == "revisits":
        assert torch.equal(perturb(batch, kind, unperturbed(kind, 4)).lr, batch.lr)
