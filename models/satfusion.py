"""The composition: encoder, upsampler, head and spectral refinement."""

from __future__ import annotations

from typing import NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import bilinear, resize
from models.config import ModelConfig
from models.contracts import Encoder, Head, Size

REFINEMENT_WIDTH = 64
IDLE_REFINEMENT_BANDS = 3

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The layout with the channels last, by the number of axes."""


class Fusion(NamedTuple):
    """Result of a model: images on the grid of the panchromatic one, neither clamped nor normalised."""

    fused: Tensor
    """The result [B, C, H, W], reflectance."""

    mfif: Tensor | None
    """The encoder's image [B, C, H, W]; None for a head alone."""

    msif: Tensor | None
    """The head's image [B, C, H, W]; None for an encoder alone."""


class Upsampler(nn.Module):
    """Map from features on the low-resolution grid to an image that is ``zoom`` times as large."""

    def __init__(self, hidden: int, bands: int, zoom: int) -> None:
        super().__init__()
        width = hidden // zoom**2
        self.shuffle = nn.PixelShuffle(zoom)
        self.conv1 = nn.Conv2d(width, width, 1)
        self.act1 = nn.PReLU()
        self.conv2 = nn.Conv2d(width, bands, 1)
        self.act2 = nn.PReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, D, h, w] to [B, C, zoom h, zoom w]."""
        x = self.act1(self.conv1(self.shuffle(features)))
        return cast(Tensor, self.act2(self.conv2(x)))


class SpectralRefinement(nn.Module):
    """Residual of two 1x1 convolutions: mixes the bands of a pixel, never its neighbours."""

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(bands, REFINEMENT_WIDTH, 1)
        self.conv2 = nn.Conv2d(REFINEMENT_WIDTH, bands, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        return cast(Tensor, image + self.conv2(F.relu(self.conv1(image))))


class SatFusion(nn.Module):
    """Multi-frame and multi-source fusion: an encoder, a head, or one after the other.

    Tong et al., "SatFusion: A Unified Framework for Enhancing Remote Sensing Images via Multi-Frame and Multi-Source
    Images Fusion", arXiv 2510.07905. The published model holds upsampler and refinement even if its stages do not use
    them.

    Args:
        config: Configuration of the model.
        encoder: The first stage, or None.
        head: The second stage, or None; at least one stage is present.
    """

    def __init__(self, config: ModelConfig, encoder: Encoder | None, head: Head | None) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.upsampler = Upsampler(config.hidden, config.bands, config.zoom) if encoder or config.published else None
        self.head = head
        # The published one has 3 bands in any case where no stage uses it.
        used = bool(encoder and head)
        bands = config.bands if used else IDLE_REFINEMENT_BANDS
        self.refinement = SpectralRefinement(bands) if used or config.published else None
        self._frozen: list[nn.Module] = []

    def forward(self, lr: Tensor, pan: Tensor, revisit: Tensor | None = None) -> Fusion:
        """Fuse one batch.

        Args:
            lr: Revisits [B, R, C, h, w], reflectance.
            pan: Panchromatic image [B, 1, H, W], reflectance; its grid is the output's.
            revisit: For a head alone, the 0-based revisit of each sample, int64 [B]; 0 by default.

        Returns:
            The fused image and the images of both stages.

        Raises:
            ValueError: If a shape does not match the model.
        """
        self._check(lr, pan)
        size = _size(pan)
        if self.encoder is None:
            ms = bilinear(_pick(lr, revisit), size)
            return self._sharpen_alone(ms, pan)
        assert self.upsampler is not None  # an encoder always comes with it
        mfif = resize(self.upsampler(self.encoder(lr, pan)), size)
        if self.head is None:
            return Fusion(fused=mfif, mfif=mfif, msif=None)
        msif = self.head(mfif, pan)
        assert self.refinement is not None  # so does a pair with this
        return Fusion(fused=self.refinement(mfif + msif), mfif=mfif, msif=msif)

    def at_step(self, step: int) -> None:
        """Receive, before an optimizer step in training, the number of steps taken."""
        for stage in (self.encoder, self.head):
            if stage is not None:
                stage.at_step(step)

    def freeze(self, stage: str) -> None:
        """Stop training a stage, from here on: no gradients, and norms and dropout as in evaluation.

        Args:
            stage: ``encoder`` (with the upsampler, so that its image stays) or ``head``.

        Raises:
            ValueError: If the model has no such stage.
        """
        parts = (self.encoder, self.upsampler) if stage == "encoder" else (self.head,)
        if parts[0] is None:
            raise ValueError(f"the model has no {stage} to freeze")
        self._frozen += [part for part in parts if part is not None]
        for part in self._frozen:
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    @property
    def is_settled(self) -> bool:
        """Return whether both stages are settled (`Stage.is_settled`)."""
        return all(stage.is_settled for stage in (self.encoder, self.head) if stage is not None)

    @property
    def may_leave_idle(self) -> bool:
        """Return whether a training step may leave parameters without gradient."""
        if self.config.published:  # it holds unused parameters
            return True
        return any(stage.may_leave_idle for stage in (self.encoder, self.head) if stage is not None)

    def _sharpen_alone(self, ms: Tensor, pan: Tensor) -> Fusion:
        assert self.head is not None  # build_model builds no model without a stage
        msif = self.head(ms, pan)
        if self.head.adds_input:
            msif = ms + msif
        return Fusion(fused=msif, mfif=None, msif=msif)

    @torch.no_grad()
    def channels_last(self) -> Self:
        """Lay the weights out with the channels last, in place, and return the model.

        ``to(memory_format=torch.channels_last)`` refuses the 3-D convolutions of RAMS.
        """
        for parameter in self.parameters():
            if parameter.ndim in CHANNELS_LAST:
                parameter.data = parameter.data.contiguous(memory_format=CHANNELS_LAST[parameter.ndim])
        return self

    def _check(self, lr: Tensor, pan: Tensor) -> None:
        bands = self.config.bands
        if lr.ndim != 5 or lr.shape[2] != bands:
            raise ValueError(f"lr must be [B, R, {bands}, h, w] for {bands} bands, and is {list(lr.shape)}")
        if pan.ndim != 4 or pan.shape[1] != 1 or pan.shape[0] != lr.shape[0]:
            raise ValueError(f"pan must be [{lr.shape[0]}, 1, H, W] beside this lr, and is {list(pan.shape)}")
        for stage in (self.encoder, self.head):
            if stage is not None:
                stage.check_sizes(self.config, _size(lr), _size(pan))


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def _pick(lr: Tensor, revisit: Tensor | None) -> Tensor:
    """Return one revisit of each sample, [B, C, h, w]."""
    if revisit is None:
        return lr[:, 0]
    if revisit.shape != lr.shape[:1]:
        raise ValueError(f"revisit must be [{lr.shape[0]}], one index a sample, and is {list(revisit.shape)}")
    return lr[torch.arange(lr.shape[0], device=lr.device), revisit]
