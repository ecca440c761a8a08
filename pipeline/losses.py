"""The training loss: registered MSE, MAE and SSIM, and an unregistered spectral angle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.registration import MODES, Mode, register
from pipeline.similarity import spectral_cosine, ssim_map, widen
from sharding.errors import UserError, nearest

SSIM_TAPS = 5
"""Window of the SSIM loss, pixels; the metric's is wider."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss and how a prediction is compared with its target.

    Raises:
        UserError: If a weight is negative, the weights do not sum to 1, or the registration is unknown.
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
    """How the target is shifted to the prediction: "centred", or "published" for the paper's figures."""

    bias_adjust: bool = False
    """Whether a prediction is first moved to its target's band means, which leaves its radiometry free."""

    def __post_init__(self) -> None:
        weights = {"mse": self.mse, "mae": self.mae, "ssim": self.ssim, "sam": self.sam}
        for name, weight in weights.items():
            if not 0 <= weight <= 1:
                raise UserError(f"loss.{name} = {weight} is no weight: it must be from 0 to 1")
        total = sum(weights.values())
        if not math.isclose(total, 1, abs_tol=1e-6):
            terms = " + ".join(f"{name} {weight:g}" for name, weight in weights.items())
            raise UserError(f"the loss weights {terms} sum to {total:g}, and must sum to 1")
        if self.registration not in MODES:
            known = nearest(self.registration, MODES)
            raise UserError(f"loss.registration = {self.registration!r} is unknown{known}")


class LossParts(NamedTuple):
    """Loss and parts of each sample [B], before weighting; all are differentiable but the shift."""

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
    """Chosen (dy, dx) [B, 2], pixels."""


def bias_adjust(prediction: Tensor, target: Tensor) -> Tensor:
    """Move each sample and band of [B, C, H, W] to its target's mean; the gradient flows through the mean."""
    return prediction + (target - prediction).mean(dim=(-2, -1), keepdim=True)


def fusion_loss(prediction: Tensor, target: Tensor, config: LossConfig) -> LossParts:
    """Return the loss of each sample.

    Half and bfloat16 images, and images under autocast, are compared in float32.

    Args:
        prediction: Fused images [B, C, H, W], reflectance.
        target: High-resolution images of the same shape.
        config: Weights and registration.

    Raises:
        UserError: If the images are smaller than 11 px.
        ValueError: If the shapes differ.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = widen(prediction), widen(target)
        if config.bias_adjust:
            prediction = bias_adjust(prediction, target)
        pair = register(prediction, target, config.registration)
        difference = pair.prediction - pair.target
        similarity = ssim_map(pair.prediction, pair.target, SSIM_TAPS, mirror=True, epsilon=1e-12)
        mse = difference.square().mean(dim=(1, 2, 3))
        mae = difference.abs().mean(dim=(1, 2, 3))
        ssim = ((1 - similarity) / 2).clamp(0, 1).mean(dim=(1, 2, 3))
        sam = (1 - spectral_cosine(prediction, target)).mean(dim=(1, 2))
        total = config.mse * mse + config.mae * mae + config.ssim * ssim + config.sam * sam
    return LossParts(total, mse, mae, ssim, sam, pair.shift)
