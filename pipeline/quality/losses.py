"""The training loss: registered MSE, MAE and SSIM, and an unregistered spectral angle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.satfusion import Fusion
from pipeline.quality.registration import MODES, Mode, Registered, register
from pipeline.quality.similarity import spectral_cosine, ssim_map, widen
from sharding.errors import UserError, nearest

SSIM_TAPS = 5
"""Window of the SSIM loss, pixels; the metric's is wider."""

PREFERENCE = 0.1
"""Penalty of the centred loss for each squared pixel of shift, as a share of the error.

A loss that accepts any shift does not fix the position of the whole image: the shift that a blurred image happens to
fit best in the first steps becomes the network's own and stays. A tenth is enough to make that the centre
(docs/experiments.md), and is small beside the cost of a real misregistration. Metrics have no penalty.
"""

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
        if self.registration not in MODES:
            known = nearest(self.registration, MODES)
            raise UserError(f"loss.registration = {self.registration!r} is unknown{known}")
        if self.placement not in PLACEMENTS:
            raise UserError(f"loss.placement = {self.placement!r} is unknown{nearest(self.placement, PLACEMENTS)}")


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

    shift: Tensor
    """Chosen (dy, dx) of the result [B, 2], pixels."""


def bias_adjust(prediction: Tensor, target: Tensor) -> Tensor:
    """Shift each sample and band of [B, C, H, W] to its target's mean; the gradient flows through the mean."""
    return prediction + (target - prediction).mean(dim=(-2, -1), keepdim=True)


def fusion_loss(images: Fusion, target: Tensor, config: LossConfig) -> LossParts:
    """Return the loss of each sample.

    Half and bfloat16 images, and images under autocast, are compared in float32.

    Args:
        images: Result of the network, images [B, C, H, W], reflectance.
        target: High-resolution images of the same shape.
        config: Weights, placement and registration.

    Raises:
        UserError: If the images are smaller than 11 px.
        ValueError: If the shapes differ.
    """
    with torch.autocast(target.device.type, enabled=False):
        target = widen(target)
        prediction = _prepare(images.fused, target, config)
        pair = _register(prediction, target, config)
        of_encoder = _pair_of(images.mfif, images, pair, target, config)
        of_head = _pair_of(images.msif, images, pair, target, config)
        similarity = ssim_map(of_head.prediction, of_head.target, SSIM_TAPS, mirror=True, epsilon=1e-12)
        mse = (of_encoder.prediction - of_encoder.target).square().mean(dim=(1, 2, 3))
        mae = (pair.prediction - pair.target).abs().mean(dim=(1, 2, 3))
        ssim = ((1 - similarity) / 2).clamp(0, 1).mean(dim=(1, 2, 3))
        sam = (1 - spectral_cosine(prediction, target)).mean(dim=(1, 2))
        total = config.mse * mse + config.mae * mae + config.ssim * ssim + config.sam * sam
    return LossParts(total, mse, mae, ssim, sam, pair.shift)


def _prepare(image: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    image = widen(image)
    return bias_adjust(image, target) if config.bias_adjust else image


def _register(prediction: Tensor, target: Tensor, config: LossConfig) -> Registered:
    return register(prediction, target, config.registration, PREFERENCE if config.registration == "centred" else 0.0)


def _pair_of(image: Tensor | None, images: Fusion, fused: Registered, target: Tensor, config: LossConfig) -> Registered:
    """Register a stage's image if the loss is staged; else, or if the image is the result, return the result's pair."""
    if config.placement == "fused" or image is None or image is images.fused:
        return fused
    return _register(_prepare(image, target, config), target, config)
