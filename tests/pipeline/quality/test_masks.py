"""Pixels without data: they change no loss and no metric, and a chip without enough others does not count."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from models.satfusion import Fusion
from pipeline.quality.losses import LossConfig, fusion_loss
from pipeline.quality.masks import has_data, registered_mask, window_mask
from pipeline.quality.metrics import image_metrics
from pipeline.quality.registration import Mode, register

SIZE = 40


def images() -> tuple[Tensor, Tensor, Tensor]:
    """Return a prediction, a target whose left part holds no data, and the mask, [2, 3, 40, 40] and [2, 1, 40, 40]."""
    generator = torch.Generator().manual_seed(3)
    target = torch.rand(2, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    prediction = target + 0.05 * torch.rand(target.shape, generator=generator, dtype=torch.float64)
    valid = torch.ones(2, 1, SIZE, SIZE, dtype=torch.float64)
    valid[..., :9] = 0
    return prediction, target * valid, valid


def values(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.detach().flatten() for part in parts][:5])


@pytest.mark.parametrize(
    "config",
    [LossConfig(), LossConfig(registration="published", bias_adjust=True), LossConfig(placement="staged")],
    ids=["centred", "published", "staged"],
)
def test_what_stands_there_changes_no_loss(config: LossConfig) -> None:
    prediction, target, valid = images()
    other = torch.where(valid == 1, target, 7.0)
    guess = torch.where(valid == 1, prediction, -3.0).requires_grad_()
    found = fusion_loss(Fusion(prediction, prediction + 0.01, prediction - 0.01), target, config, valid)
    again = fusion_loss(Fusion(guess, guess + 0.01, guess - 0.01), other, config, valid)
    assert torch.allclose(values(found), values(again), rtol=1e-9, atol=1e-12)
    assert torch.equal(found.shift, again.shift)
    # Nor does it get a gradient.
    again.total.sum().backward()
    assert guess.grad is not None
    assert (guess.grad[(valid == 0).expand_as(guess)] == 0).all()
    assert (guess.grad[(valid == 1).expand_as(guess)] != 0).any()


@pytest.mark.parametrize("mode", ["centred", "published"])
def test_what_stands_there_changes_no_metric(mode: Mode) -> None:
    prediction, target, valid = images()
    other = torch.where(valid == 1, target, 7.0)
    guess = torch.where(valid == 1, prediction, -3.0)
    found = image_metrics(prediction, target, mode, valid=valid)
    again = image_metrics(guess, other, mode, valid=valid)
    for name, value in found.items():
        assert torch.allclose(value, again[name], rtol=1e-9, atol=1e-12), name


def test_the_loss_is_that_of_the_part_with_data() -> None:
    """The mean squared and absolute errors are those of the image without the empty columns."""
    prediction, target, valid = images()
    parts = fusion_loss(Fusion(prediction, None, None), target, LossConfig(), valid)
    cut = fusion_loss(Fusion(prediction[..., 9:], None, None), target[..., 9:], LossConfig())
    for name in ("mse", "mae", "sam", "shift"):
        assert torch.allclose(getattr(parts, name), getattr(cut, name), rtol=1e-9), name
    metrics, expected = (
        image_metrics(prediction, target, valid=valid),
        image_metrics(prediction[..., 9:], target[..., 9:]),
    )
    for name in ("mse", "mae", "psnr", "sam", "ergas", "mse_adjusted", "ergas_adjusted"):
        assert torch.allclose(metrics[name], expected[name], rtol=1e-9), name


def test_a_full_mask_is_no_mask() -> None:
    prediction, target, valid = images()
    full = torch.ones_like(valid)
    for config in (LossConfig(), LossConfig(registration="published", bias_adjust=True)):
        masked, plain = (fusion_loss(Fusion(prediction, None, None), target, config, mask) for mask in (full, None))
        assert torch.allclose(values(masked), values(plain), rtol=1e-12)
    metrics, expected = (image_metrics(prediction, target, valid=mask) for mask in (full, None))
    assert all(torch.allclose(metrics[name], expected[name], rtol=1e-12) for name in expected)


def test_a_pixel_counts_if_no_shift_reads_one_without_data() -> None:
    valid = torch.ones(1, 1, 31, 31)
    valid[0, 0, 15, 15] = 0
    mask = registered_mask(valid)
    assert mask.shape == (1, 1, 21, 21)
    expected = torch.ones(21, 21)
    expected[5:16, 5:16] = 0
    assert torch.equal(mask[0, 0], expected)
    windows = window_mask(mask, 5)[0, 0]
    expected[3:18, 3:18] = 0
    assert torch.equal(windows, expected)
    whole = torch.rand(1, 1, 31, 31)
    holed = whole.clone()
    holed[0, 0, 15, 15] = 5
    for shift in range(81):
        # Whatever shift is best, the pixels that count are the same with and without the hole.
        row, column = divmod(shift, 9)
        prediction = torch.roll(whole, ((4 - row) // 2, (4 - column) // 2), (2, 3))
        one, other = (register(prediction, image, mask=mask) for image in (whole, holed))
        assert torch.equal(one.target * mask, other.target * mask)


@pytest.mark.parametrize(("side", "counts"), [(20, 0), (21, 1)])
def test_a_chip_counts_with_a_square_of_21_pixels(side: int, counts: int) -> None:
    valid = torch.zeros(1, 1, 60, 60)
    valid[..., 20 : 20 + side, 20 : 20 + side] = 1
    assert has_data(valid).tolist() == [counts]
    prediction = torch.rand(1, 3, 60, 60)
    metrics = image_metrics(prediction, prediction, valid=valid)
    if counts:
        assert metrics["ssim"].item() == pytest.approx(1)


def test_a_whole_small_chip_counts() -> None:
    assert has_data(torch.ones(2, 1, 12, 12)).tolist() == [1, 1]
    assert has_data(torch.zeros(1, 1, 12, 12)).tolist() == [0]
