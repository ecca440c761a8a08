"""The optional terms of the loss by plain formulas: consistency with the revisits, and the spectral angle."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.satfusion import Fusion
from pipeline.config import RunConfig
from pipeline.quality.consistency import consistency_error, revisits_median
from pipeline.quality.losses import LossConfig, fusion_loss
from pipeline.quality.similarity import DARK, spectral_chord
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.errors import UserError

BORDER = 5
"""Pixels that registration leaves out."""


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 0.9, shape))


def gaussian(fine: int, coarse: int) -> np.ndarray:
    """Return the weights [coarse, fine] of a sensor with gain 0.3 at the coarse grid's Nyquist frequency."""
    ratio = fine / coarse
    width = ratio * math.sqrt(-2 * math.log(0.3)) / math.pi
    distance = np.arange(fine) - ((np.arange(coarse) + 0.5) * ratio - 0.5)[:, None]
    weights = np.where(abs(distance) <= 3 * width, np.exp(-0.5 * (distance / width) ** 2), 0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def test_the_error_is_that_of_the_degraded_image_to_the_median() -> None:
    fused = images(2, 3, 50, 62)
    rows, columns = gaussian(50, 16), gaussian(62, 20)
    seen = rows @ fused.numpy() @ columns.T
    # Each revisit is the degraded image and an error, which is too small to look like a shift.
    errors = np.random.default_rng(2).normal(0, 0.01, (2, 4, 3, 16, 20))
    lr = torch.from_numpy(seen[:, None] + errors)
    inner = np.s_[..., BORDER:-BORDER, BORDER:-BORDER]
    expected = abs(np.median(errors, axis=1))[inner].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(consistency_error(fused, lr, None, 0.1), expected, rtol=1e-9)


def test_a_shift_of_the_revisits_is_no_error_and_another_colour_is() -> None:
    fused = images(1, 3, 64, 64)
    seen = torch.from_numpy(gaussian(64, 32) @ fused.numpy() @ gaussian(64, 32).T)
    moved = seen.roll((1, -1), (-2, -1)).unsqueeze(1).expand(-1, 3, -1, -1, -1)
    assert consistency_error(fused, moved, None, 0.1).item() == pytest.approx(0, abs=1e-12)
    assert consistency_error(fused, moved + 0.02, None, 0.1).item() == pytest.approx(0.02, rel=1e-6)


def test_the_median_is_over_revisits_with_data() -> None:
    lr = images(2, 5, 3, 8, 9)
    lr[0, 1, :, 2:4] = 0
    lr[0, 2, :, 3] = 0
    lr[1, :, :, 5, 6] = 0  # no revisit has data
    lr[1, 0, 1, 0, 0] = 0  # one band alone may be 0
    median, seen = revisits_median(lr)
    holes = (lr == 0).all(dim=2, keepdim=True)
    expected = np.nan_to_num(np.nanmedian(np.where(holes, np.nan, lr), axis=1))
    np.testing.assert_array_equal(median, expected)
    assert (seen == 0).nonzero().tolist() == [[1, 0, 5, 6]]


def test_pixels_without_data_have_no_part() -> None:
    generator = torch.Generator().manual_seed(3)
    fused, lr = images(1, 3, 80, 80).requires_grad_(), images(1, 3, 3, 40, 40, seed=4)
    valid = torch.ones(1, 1, 80, 80, dtype=torch.float64)
    valid[..., :9] = 0
    lr[..., 20, 30:] = 0
    error = consistency_error(fused, lr, valid, 0.1)
    (gradient,) = torch.autograd.grad(error.sum(), fused)
    assert gradient.isfinite().all()
    assert gradient[..., :9].abs().max() == 0
    other = torch.where(valid > 0, fused, torch.rand(fused.shape, generator=generator, dtype=torch.float64))
    assert torch.equal(consistency_error(other, lr, valid, 0.1), error)
    nothing = consistency_error(fused, torch.zeros_like(lr), valid, 0.1)
    assert nothing.item() == 0


def test_the_chord_is_twice_the_sine_of_half_the_angle() -> None:
    a, b = images(2, 4, 7, 6), images(2, 4, 7, 6, seed=5)
    cosine = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    expected = 2 * np.sin(np.arccos(cosine.numpy()) / 2)
    np.testing.assert_allclose(spectral_chord(a, 3 * b), expected, rtol=1e-12)
    dark = torch.tensor([0.5 * DARK, 0]).view(1, 2, 1, 1)
    assert spectral_chord(dark, torch.tensor([1.0, 0]).view(1, 2, 1, 1)).item() == pytest.approx(0.5)


def test_equal_and_black_spectra_have_a_finite_gradient() -> None:
    target = torch.cat([images(1, 3, 20, 20).float(), torch.zeros(1, 3, 20, 20)])
    prediction = target.clone().requires_grad_()
    parts = fusion_loss(Fusion(prediction, None, None), target, LossConfig(angle=1.0))
    assert parts.angle.tolist() == [0, 0]
    assert torch.autograd.grad(parts.total.sum(), prediction)[0].isfinite().all()


def test_terms_come_on_top_of_the_loss() -> None:
    fused, target, lr = images(2, 3, 40, 40), images(2, 3, 40, 40, seed=6), images(2, 4, 3, 16, 16, seed=7)
    result = Fusion(fused, None, None)
    plain = fusion_loss(result, target, LossConfig())
    assert plain.angle.tolist() == plain.consistency.tolist() == [0, 0]
    both = fusion_loss(result, target, LossConfig(angle=0.5, consistency=2.0), None, lr)
    assert torch.equal(both.consistency, consistency_error(fused, lr, None, 0.1))
    assert both.angle.min() > 0
    assert torch.equal(both.total, plain.total + 0.5 * both.angle + 2.0 * both.consistency)
    with pytest.raises(ValueError, match="needs its revisits"):
        fusion_loss(result, target, LossConfig(consistency=2.0))


@pytest.mark.parametrize("name", ["angle", "consistency"])
@pytest.mark.parametrize("weight", [-0.1, 1001.0, math.nan])
def test_a_wrong_weight_is_refused(name: str, weight: float) -> None:
    with pytest.raises(UserError, match=f"loss.{name} = {weight} is not a weight: it must be from 0 to 1000"):
        LossConfig(**{name: weight})


def test_a_term_with_a_weight_has_a_column(world: World, make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_training(make_config(tmp_path, "train.max_steps=1", "loss.consistency=0.5"))
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    parts = {name: float(row[f"train/{name}"]) for name in ("loss", "mse", "mae", "ssim_loss", "sam_loss")}
    usual = 0.3 * parts["mse"] + 0.3 * parts["mae"] + 0.2 * parts["ssim_loss"] + 0.2 * parts["sam_loss"]
    assert float(row["train/consistency"]) == pytest.approx((parts["loss"] - usual) / 0.5, rel=1e-4)
    assert row["train/angle"] == ""
