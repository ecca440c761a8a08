"""The training loss: registered MSE, MAE and SSIM, an unregistered spectral cosine, and optional terms of colour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.satfusion import Fusion
from pipeline.quality.consistency import consistency_error
from pipeline.quality.masks import band_means, mean_over, registered_mask, window_mask
from pipeline.quality.registration import MODES, Mode, Registered, register
from pipeline.quality.similarity import spectral_chord, spectral_cosine, ssim_map, widen
from sharding.errors import UserError, nearest

SSIM_TAPS = 5
"""Window of the SSIM loss, pixels; the metric's is wider."""

PREFERENCE = 0.1
"""Penalty of the centred loss for each squared pixel of shift, as a share of the error.

A loss that accepts any shift does not fix the position of the whole image: the shift that a blurred image happens to
fit best in the first steps becomes the network's own and stays. A tenth is enough to make that the centre
(docs/experiments.md), and is small beside the cost of a real misregistration. Metrics have no penalty.
"""

MOST = 1000.0
"""Largest weight of an optional term."""

Placement = Literal["fused", "staged"]
PLACEMENTS: tuple[Placement, ...] = ("fused", "staged")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss, and its registration of prediction and target.

    Raises:
        UserError: If a weight is negative, the weights do not sum to 1, or a name is unknown.
    """

    mse: float = 0.3
    """Weight of the mean squared error, 0 to 1."""

    mae: float = 0.3
    """Weight of the mean absolute error, 0 to 1."""

    ssim: float = 0.2
    """Weight of (1 - SSIM) / 2, 0 to 1."""

    sam: float = 0.2
    """Weight of 1 - cosine of the spectral angle, 0 to 1."""

    angle: float = 0.0
    """Weight of the spectral angle itself, about in radians, of the registered result; comes on top of the four, which
    sum to 1. Near 0 the cosine has no slope, and the angle has."""

    consistency: float = 0.0
    """Weight of the mean absolute error of the result, brought to the LR grid, to the median of the revisits; comes on
    top of the four. For targets whose colours are not those of the revisits it costs fidelity to the target."""

    registration: Mode = "centred"
    """Registration of the target to the prediction: "centred", or "published" for the paper's figures."""

    placement: Placement = "fused"
    """Image that each part compares: "fused": the result for all; "staged": the squared error uses the encoder's image,
    SSIM the head's, the absolute error and the spectral angle the result. If a stage is absent, its part uses the
    result."""

    bias_adjust: bool = False
    """Whether a prediction is first shifted to its target's band means, which leaves its radiometry unconstrained."""

    def __post_init__(self) -> None:
        weights = {"mse": self.mse, "mae": self.mae, "ssim": self.ssim, "sam": self.sam}
        for name, weight in weights.items():
            if not 0 <= weight <= 1:
                raise UserError(f"loss.{name} = {weight} is not a weight: it must be from 0 to 1")
        total = sum(weights.values())
        if not math.isclose(total, 1, abs_tol=1e-6):
            terms = " + ".join(f"{name} {weight:g}" for name, weight in weights.items())
            raise UserError(f"the loss weights {terms} sum to {total:g}, and must sum to 1")
        for name, weight in (("angle", self.angle), ("consistency", self.consistency)):
            if not 0 <= weight <= MOST:
                raise UserError(f"loss.{name} = {weight} is not a weight: it must be from 0 to {MOST:g}")
        if self.registration not in MODES:
            known = nearest(self.registration, MODES)
            raise UserError(f"loss.registration = {self.registration!r} is unknown{known}")
        if self.placement not in PLACEMENTS:
            raise UserError(f"loss.placement = {self.placement!r} is unknown{nearest(self.placement, PLACEMENTS)}")

    @property
    def measured(self) -> tuple[str, ...]:
        """Return the fields of `LossParts` that are computed: an optional term without a weight is not."""
        optional = (name for name in ("angle", "consistency") if getattr(self, name))
        return ("total", "mse", "mae", "ssim", "sam", *optional)


class LossParts(NamedTuple):
    """Loss and parts of each sample [B], before weighting; all are differentiable except the shift."""

    total: Tensor
    """Weighted sum of the parts."""

    mse: Tensor
    """Mean squared error after registration."""

    mae: Tensor
    """Mean absolute error after registration."""

    ssim: Tensor
    """Mean of (1 - SSIM) / 2 after registration, 0 to 1."""

    sam: Tensor
    """Mean of 1 - cosine of the spectral angle, without registration, 0 to 2."""

    angle: Tensor
    """Mean of 2 sin(angle / 2) of the spectra after registration; 0 if its weight is 0."""

    consistency: Tensor
    """Mean absolute error to the revisits on their grid; 0 if its weight is 0."""

    shift: Tensor
    """Chosen (dy, dx) of the result [B, 2], pixels."""


def bias_adjust(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Shift each sample and band of [B, C, H, W] to its target's mean; the gradient flows through the mean.

    A mask [B, 1, H, W] limits both means to pixels with data.
    """
    return prediction + band_means(target - prediction, valid)


def fusion_loss(
    images: Fusion, target: Tensor, config: LossConfig, valid: Tensor | None = None, lr: Tensor | None = None
) -> LossParts:
    """Return the loss of each sample.

    Half and bfloat16 images, and images under autocast, are compared in float32.

    Args:
        images: Result of the network, images [B, C, H, W], reflectance.
        target: High-resolution images of the same shape.
        config: Weights, placement and registration.
        valid: Mask [B, 1, H, W] of pixels with data, 1 or 0; the others have no part in any value. None takes all.
        lr: Revisits [B, R, C, h, w], reflectance; needed if the consistency has a weight.

    Raises:
        UserError: If the images, or revisits that are compared, are smaller than 11 px.
        ValueError: If the shapes differ, or the revisits are missing.
    """
    if config.consistency and lr is None:
        raise ValueError("the consistency of a fused image needs its revisits: give lr")
    with torch.autocast(target.device.type, enabled=False):
        target = widen(target)
        compared = _Compared(target, valid, config)
        prediction = compared.adjusted(images.fused)
        pair = compared.register(prediction)
        of_encoder = _pair_of(images.mfif, images, pair, compared)
        of_head = _pair_of(images.msif, images, pair, compared)
        similarity = ssim_map(of_head.prediction, of_head.target, SSIM_TAPS, mirror=True, epsilon=1e-12)
        windows = None if compared.mask is None else window_mask(compared.mask, SSIM_TAPS)
        mse = mean_over((of_encoder.prediction - of_encoder.target).square(), compared.mask)
        mae = mean_over((pair.prediction - pair.target).abs(), compared.mask)
        ssim = mean_over(((1 - similarity) / 2).clamp(0, 1), windows)
        sam = mean_over((1 - spectral_cosine(prediction, target)).unsqueeze(1), valid)
        total = config.mse * mse + config.mae * mae + config.ssim * ssim + config.sam * sam
        angle = consistency = torch.zeros_like(total)
        if config.angle:
            angle = mean_over(spectral_chord(pair.prediction, pair.target).unsqueeze(1), compared.mask)
            total = total + config.angle * angle
        if config.consistency and lr is not None:
            consistency = consistency_error(widen(images.fused), widen(lr), valid, PREFERENCE)
            total = total + config.consistency * consistency
    return LossParts(total, mse, mae, ssim, sam, angle, consistency, pair.shift)


class _Compared(NamedTuple):
    """Target of a comparison, the pixels that count, and how images are prepared for it."""

    target: Tensor
    valid: Tensor | None
    config: LossConfig

    @property
    def mask(self) -> Tensor | None:
        """Mask of the registered pixels that count; None for all."""
        return None if self.valid is None else registered_mask(self.valid)

    def adjusted(self, image: Tensor) -> Tensor:
        image = widen(image)
        return bias_adjust(image, self.target, self.valid) if self.config.bias_adjust else image

    def register(self, prediction: Tensor) -> Registered:
        mode = self.config.registration
        return register(prediction, self.target, mode, PREFERENCE if mode == "centred" else 0.0, self.mask)


def _pair_of(image: Tensor | None, images: Fusion, fused: Registered, compared: _Compared) -> Registered:
    """Register a stage's image if the loss is staged; else, or if the image is the result, return the result's pair."""
    if compared.config.placement == "fused" or image is None or image is images.fused:
        return fused
    return compared.register(compared.adjusted(image))
