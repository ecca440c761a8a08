"""Registration finds known shifts, leaves equal images alone, and carries the right gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.quality.registration import CENTRE, MODES, STEPS, Mode, register, shift_kernels
from sharding.errors import UserError

SHIFTS = [(dy, dx) for dy in STEPS for dx in STEPS]


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def waves(size: int, shifts: list[tuple[float, float]]) -> Tensor:
    """Return one band-limited periodic image, seen from each (dy, dx): [len(shifts), 2, size, size].

    Shifted by the phases of its Fourier series, hence exactly and without an interpolation kernel.
    """
    spectrum = torch.fft.rfft2(noise(1, 2, size, size))
    rows, columns = torch.fft.fftfreq(size).double(), torch.fft.rfftfreq(size).double()
    spectrum = spectrum * ((rows.abs().unsqueeze(1) < 0.15) & (columns < 0.15))
    moved = [spectrum * torch.exp(2j * math.pi * (dy * rows.unsqueeze(1) + dx * columns)) for dy, dx in shifts]
    return torch.fft.irfft2(torch.cat(moved), s=(size, size))


def all_copies(prediction: Tensor, target: Tensor, mode: Mode) -> Tensor:
    """Return the MSE of every shift [81, B] in the direct form: 81 convolutions by 11 x 11 kernels."""
    kernels = shift_kernels(mode).to(target)
    grid = torch.einsum("im,jn->ijmn", kernels, kernels).reshape(81, 1, 11, 11)
    batch, bands, height, width = target.shape
    shifted = F.conv2d(target.reshape(-1, 1, height, width), grid).view(batch, bands, 81, height - 10, width - 10)
    crop = 5 if mode == "centred" else 2
    cropped = prediction[:, :, None, crop : crop + height - 10, crop : crop + width - 10]
    return (cropped - shifted).square().mean(dim=(1, 3, 4)).T


def test_centred_kernels_sum_to_one_and_whole_shifts_are_exact() -> None:
    kernels = shift_kernels("centred")
    torch.testing.assert_close(kernels.sum(dim=1), torch.ones(9, dtype=torch.float64))
    for number, step in enumerate(STEPS):
        if step == round(step):
            assert kernels[number].tolist() == [float(tap == 5 + step) for tap in range(11)]
        else:
            assert torch.equal(kernels[number], kernels[8 - number].flip(0))


def test_published_kernels_are_the_published_formula() -> None:
    taps, steps = np.arange(-5, 6), np.array(STEPS)[:, None]
    u = np.pi * (taps - steps) + 0.001
    expected = torch.from_numpy(3 * np.sin(u) * np.sin(u / 3) / u**2)
    kernels = shift_kernels("published")
    assert kernels.dtype == torch.float32
    torch.testing.assert_close(kernels.double(), expected, atol=2e-6, rtol=0)
    sums = kernels.sum(dim=1)
    assert 0.994 < sums.min() < 0.9945
    assert 1.0125 < sums.max() < 1.013


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(11, 11), (40, 31), (156, 156)])
def test_equal_images_are_left_alone(size: tuple[int, int], dtype: torch.dtype) -> None:
    image = noise(2, 3, *size, dtype=dtype)
    image[1] = 0.25  # on a flat image every whole shift fits as well as none
    pair = register(image, image)
    assert pair.index.tolist() == [CENTRE, CENTRE]
    assert pair.shift.tolist() == [[0, 0], [0, 0]]
    assert torch.equal(pair.prediction, pair.target)
    assert pair.mse_per_shift[CENTRE].tolist() == [0, 0]
    assert (pair.mse_per_shift[:, 0] > 0).sum() == 80


@pytest.mark.parametrize("preference", [0.0, 0.1])
def test_all_81_sub_pixel_shifts_are_found(preference: float) -> None:
    target = waves(64, [(0, 0)]).expand(81, -1, -1, -1)
    pair = register(waves(64, SHIFTS), target, preference=preference)
    assert pair.index.tolist() == list(range(81))
    assert [tuple(shift) for shift in pair.shift.tolist()] == SHIFTS
    least = pair.mse_per_shift.gather(0, pair.index.unsqueeze(0)).squeeze(0)
    others = pair.mse_per_shift.topk(2, dim=0, largest=False).values[1]
    assert (least < others / 20).all()
    torch.testing.assert_close(pair.prediction, pair.target, atol=0.03 * target.std().item(), rtol=0)


def test_of_shifts_that_fit_about_as_well_the_shorter_is_preferred() -> None:
    prediction, target = noise(8, 3, 40, 40, seed=1), noise(8, 3, 40, 40, seed=2)
    free, preferring = (register(prediction, target, preference=preference) for preference in (0.0, 0.1))
    assert torch.equal(free.mse_per_shift, preferring.mse_per_shift)
    length = torch.tensor(SHIFTS).square().sum(dim=1, keepdim=True)
    assert torch.equal(preferring.index, (free.mse_per_shift * (1 + 0.1 * length)).argmin(dim=0))
    assert (preferring.shift.norm(dim=1) <= free.shift.norm(dim=1)).all()
    assert preferring.shift.norm() < free.shift.norm() / 2


def test_shifts_between_the_steps_go_to_the_nearest() -> None:
    target = waves(64, [(0, 0)])
    pair = register(waves(64, [(0.6, -1.35)]), target)
    assert pair.shift.tolist() == [[0.5, -1.5]]


@pytest.mark.parametrize("mode", MODES)
def test_errors_and_gradient_equal_the_81_copy_form(mode: Mode) -> None:
    target = noise(3, 3, 24, 29, seed=1)
    prediction = (target.roll((1, -1), (2, 3)) + 0.3 * noise(3, 3, 24, 29, seed=2)).requires_grad_()
    pair = register(prediction, target, mode)
    direct = all_copies(prediction, target, mode)
    assert not pair.mse_per_shift.requires_grad
    torch.testing.assert_close(pair.mse_per_shift, direct.detach())
    assert torch.equal(pair.index, direct.argmin(dim=0))
    (ours,) = torch.autograd.grad((pair.prediction - pair.target).square().mean(dim=(1, 2, 3)).sum(), prediction)
    (theirs,) = torch.autograd.grad(direct.amin(dim=0).sum(), prediction)
    torch.testing.assert_close(ours, theirs)


def test_the_published_form_cannot_match_equal_images() -> None:
    image = noise(1, 3, 40, 40)
    assert register(image, image, "published").mse_per_shift.min() > 0.01


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="images of 10 px are too small to register: 11 px is the least"):
        register(noise(1, 3, 10, 20), noise(1, 3, 10, 20))
    with pytest.raises(UserError, match="'centered' is unknown; did you mean 'centred'"):
        shift_kernels("centered")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both are"):
        register(noise(1, 3, 20, 20), noise(1, 1, 20, 20))
