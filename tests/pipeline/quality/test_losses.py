"""The loss equals the published one in published mode, and plain formulas in simple cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.satfusion import Fusion
from pipeline.quality.losses import PREFERENCE, LossConfig, LossParts, bias_adjust, fusion_loss
from pipeline.quality.registration import register
from sharding.errors import UserError
from tests.golden import cases

PUBLISHED = cases.TRAINING_LOSS


def golden_pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    prediction = torch.from_numpy(cases.load("losses_prediction")["prediction"]).to(dtype)
    return prediction, cases.image("target", 3, 3, 156, 156, dtype=dtype)


def result_loss(prediction: Tensor, target: Tensor, config: LossConfig) -> LossParts:
    return fusion_loss(Fusion(prediction, None, None), target, config)


def assert_near(ours: Tensor, golden: np.ndarray) -> None:
    expected = torch.from_numpy(np.asarray(golden)).to(ours)
    assert ((ours.detach() - expected).abs().max() / expected.abs().max()).item() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_loss_and_gradient(dtype: torch.dtype) -> None:
    golden = cases.load("losses")
    prediction, target = golden_pair(dtype)
    prediction.requires_grad_()
    parts = result_loss(prediction, target, PUBLISHED)
    assert_near(parts.mse, golden["mse"])
    assert_near(parts.mae, golden["mae"])
    assert_near(parts.ssim, golden["ssim_loss"])
    assert_near(parts.sam.mean(), golden["sam_loss"])
    assert_near(parts.total.mean(), golden["loss"])
    (gradient,) = torch.autograd.grad(parts.total.mean(), prediction)
    assert_near(gradient[..., ::5, ::5], golden["gradient"])
    assert_near(gradient.norm(), golden["gradient_l2"])


def test_published_shifts() -> None:
    golden = cases.load("losses")
    prediction, target = golden_pair()
    pair = register(bias_adjust(prediction, target), target, "published")
    assert_near(pair.mse_per_shift, golden["mse_per_shift"])
    assert pair.index.tolist() == golden["best_shift"].tolist()


def test_equal_images_lose_nothing() -> None:
    _, target = golden_pair(torch.float64)
    prediction = target.clone().requires_grad_()
    parts = result_loss(prediction, target, LossConfig())
    assert parts.mse.tolist() == parts.mae.tolist() == [0, 0, 0]
    assert parts.total.max() < 1e-7
    assert torch.autograd.grad(parts.total.sum(), prediction)[0].isfinite().all()


def test_black_pixels_have_a_finite_gradient() -> None:
    prediction = torch.zeros(1, 3, 20, 20, requires_grad=True)
    parts = result_loss(prediction, torch.zeros(1, 3, 20, 20), LossConfig())
    assert parts.sam.tolist() == [1]
    assert torch.autograd.grad(parts.total.sum(), prediction)[0].isfinite().all()


def test_a_constant_offset_in_closed_form() -> None:
    target = torch.full((1, 3, 30, 30), 0.4, dtype=torch.float64)
    parts = result_loss(target + 0.1, target, LossConfig())
    ssim = (2 * 0.5 * 0.4 + 1e-4) / (0.5**2 + 0.4**2 + 1e-4)  # no structure: only the luminance term remains
    expected = (0.01, 0.1, (1 - ssim) / 2, 0.0)
    assert [parts[k].item() for k in range(1, 5)] == pytest.approx(expected, abs=1e-6)
    assert parts.total.item() == pytest.approx(0.3 * 0.01 + 0.3 * 0.1 + 0.2 * (1 - ssim) / 2, abs=1e-6)
    assert result_loss(target + 0.1, target, LossConfig(bias_adjust=True)).total.item() == pytest.approx(0, abs=1e-6)


def test_the_ssim_part_mirrors_the_border() -> None:
    prediction, target = golden_pair(torch.float64)
    pair = register(prediction, target, preference=PREFERENCE)
    taps = torch.exp(-0.5 * (torch.arange(-2.0, 3.0, dtype=torch.float64) / 1.5) ** 2)
    window = torch.outer(taps, taps).expand(3, 1, 5, 5) / taps.sum() ** 2

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.pad(image, (2, 2, 2, 2), mode="reflect"), window, groups=3)

    a, b = pair.prediction, pair.target
    mean_a, mean_b = blur(a), blur(b)
    covariance, variances = blur(a * b) - mean_a * mean_b, blur(a * a) + blur(b * b) - mean_a**2 - mean_b**2
    ssim = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4) * (2 * covariance + 9e-4)
    ssim = ssim / (variances + 9e-4)
    expected = ((1 - ssim) / 2).clamp(0, 1).mean(dim=(1, 2, 3))
    torch.testing.assert_close(result_loss(prediction, target, LossConfig()).ssim, expected, atol=1e-8, rtol=0)


def test_the_centred_loss_prefers_short_shifts_and_the_published_one_does_not() -> None:
    generator = torch.Generator().manual_seed(2)
    prediction, target = (torch.rand(8, 3, 40, 40, generator=generator) for _ in range(2))
    centred = result_loss(prediction, target, LossConfig())
    assert torch.equal(centred.shift, register(prediction, target, preference=PREFERENCE).shift)
    assert not torch.equal(centred.shift, register(prediction, target).shift)
    published = result_loss(prediction, target, LossConfig(registration="published"))
    assert torch.equal(published.shift, register(prediction, target, "published").shift)


def test_staged_placement_looks_at_each_stage() -> None:
    result, target = golden_pair()
    generator = torch.Generator().manual_seed(3)
    mfif = (target + 0.1 * torch.rand(target.shape, generator=generator)).requires_grad_()
    msif = (target + 0.2 * torch.rand(target.shape, generator=generator)).requires_grad_()
    parts = fusion_loss(Fusion(result, mfif, msif), target, LossConfig(placement="staged"))
    torch.testing.assert_close(parts.mse, result_loss(mfif, target, LossConfig()).mse)
    torch.testing.assert_close(parts.ssim, result_loss(msif, target, LossConfig()).ssim)
    whole = result_loss(result, target, LossConfig())
    for part in ("mae", "sam", "shift"):
        torch.testing.assert_close(getattr(parts, part), getattr(whole, part))
    expected = 0.3 * parts.mse + 0.3 * parts.mae + 0.2 * parts.ssim + 0.2 * parts.sam
    torch.testing.assert_close(parts.total, expected)
    parts.total.sum().backward()
    assert mfif.grad is not None
    assert msif.grad is not None
    assert mfif.grad.abs().max() > 0
    assert msif.grad.abs().max() > 0


def test_staged_placement_leaves_the_part_of_an_absent_stage_to_the_result() -> None:
    result, target = golden_pair()
    config = LossConfig(placement="staged")
    for images in (Fusion(result, result, None), Fusion(result, None, result)):
        for part, expected in zip(
            fusion_loss(images, target, config), result_loss(result, target, LossConfig()), strict=True
        ):
            assert torch.equal(part, expected)


def test_samples_do_not_mix() -> None:
    prediction, target = golden_pair()
    whole = result_loss(prediction, target, PUBLISHED)
    for k in range(3):
        alone = result_loss(prediction[k : k + 1], target[k : k + 1], PUBLISHED)
        for part, one in zip(whole, alone, strict=True):
            torch.testing.assert_close(part[k : k + 1], one)


def test_half_precision_is_compared_in_float32() -> None:
    prediction, target = golden_pair()
    half = prediction.bfloat16()
    expected = result_loss(half.float(), target, LossConfig())
    with torch.autocast("cpu", torch.bfloat16):
        parts = result_loss(half.requires_grad_(), target, LossConfig())
    assert parts.total.dtype == torch.float32
    for ours, theirs in zip(parts, expected, strict=True):
        assert torch.equal(ours, theirs)
    parts.total.sum().backward()
    assert half.grad is not None
    assert half.grad.isfinite().all()


def test_a_non_finite_prediction_gives_a_non_finite_loss() -> None:
    prediction, target = golden_pair()
    prediction[1, 0, 80, 80] = math.nan
    total = result_loss(prediction, target, LossConfig()).total
    assert total.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mse": 0.4}, r"mse 0.4 \+ mae 0.3 \+ .* sum to 1.1, and must sum to 1"),
        ({"mse": -0.1, "mae": 0.7}, "loss.mse = -0.1 is not a weight"),
        ({"sam": math.nan}, "loss.sam = nan is not a weight"),
        ({"placement": "stage"}, "loss.placement = 'stage' is unknown; did you mean 'staged'"),
        ({"registration": "centered"}, "loss.registration = 'centered' is unknown; did you mean 'centred'"),
    ],
)
def test_a_wrong_configuration_is_refused(changes: dict[str, float | str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LossConfig(**changes)  # type: ignore[arg-type]
