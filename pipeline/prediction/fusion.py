"""Fusion of whole scenes: overlapping windows through a trained network, blended row by row in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.registry import check_sizes
from models.satfusion import SatFusion
from pipeline.networks import Weights, load_published_network, load_weights, weights_digest
from pipeline.prediction.preparation import training_dataset, window_size
from pipeline.prediction.windows import AxisWindow, plan_axis
from pipeline.training.checkpoint import read_checkpoint, select_checkpoint
from sharding.errors import UserError
from sharding.format.layout import WORLDSTRAT_CHIPS
from sharding.storage import open_storage

MICRO_BATCH = 8
"""Windows of one forward pass; the number may change the last bits of a result."""

Image = NDArray[np.float32]


class Rasters(Protocol):
    """Stored pixels that a window can be read from, such as an array in memory or a `numpy.memmap`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the number of pixels along each axis."""
        ...

    def __getitem__(self, window: Any) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Fusion:
    """A trained network that fuses whole scenes."""

    network: SatFusion
    """The network with its weights, in evaluation mode on its device."""
    name: str
    """Name of the weights: of the checkpoint, or of the published file."""
    digest: str
    """SHA-256 of the weights, in hex."""
    bf16: bool = False
    """Whether the network computes under bfloat16 autocast."""
    window: int = WORLDSTRAT_CHIPS.size
    """Side of a window, LR pixels: the side of the training's chips."""
    weights: Weights = "raw"
    """Whether the weights are those that were trained, or their moving average."""

    @classmethod
    def load(
        cls,
        run_uri: str,
        checkpoint: str = "best",
        *,
        weights: Weights = "raw",
        window: int | None = None,
        bf16: bool = False,
        device: torch.device | None = None,
    ) -> Fusion:
        """Load the weights of a run.

        Args:
            run_uri: Run folder, local or s3://.
            checkpoint: ``best``, ``last`` or a step.
            weights: ``raw``, or ``ema`` for their moving average.
            window: Side of a window, LR pixels; by default that of the training's chips, as its dataset states it.
            bf16: Compute under bfloat16 autocast.
            device: Device; by default a GPU if there is one.

        Raises:
            UserError: No such run or checkpoint, no average, or the side of the chips is not known.
        """
        run = open_storage(run_uri)
        found = read_checkpoint(run, select_checkpoint(run, checkpoint))
        size = window or window_size(training_dataset(found), found.config.model)
        network = load_weights(found, weights)
        return cls.of(network, found.name, window=size, weights=weights, bf16=bf16, device=device)

    @classmethod
    def load_published(
        cls,
        path: Path,
        pair: str,
        *,
        bands: int = 3,
        revisits: int = 8,
        window: int = WORLDSTRAT_CHIPS.size,
        bf16: bool = False,
    ) -> Fusion:
        """Load a file of weights that the published code wrote.

        Args:
            path: The file.
            pair: ``ENCODER+HEAD``.
            bands: Bands of the revisits.
            revisits: Revisits of a scene.
            window: Side of a window, LR pixels.
            bf16: Compute under bfloat16 autocast.

        Raises:
            UserError: The file does not hold the weights of that model.
        """
        network = load_published_network(path, pair, bands=bands, revisits=revisits)
        return cls.of(network, path.stem, window=window, bf16=bf16)

    @classmethod
    def of(
        cls,
        network: SatFusion,
        name: str,
        *,
        window: int = WORLDSTRAT_CHIPS.size,
        weights: Weights = "raw",
        bf16: bool = False,
        device: torch.device | None = None,
    ) -> Fusion:
        """Return a fusion by a network that has its weights."""
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        digest = weights_digest(network.state_dict())
        return cls(network.to(device).eval(), name, digest, bf16, window, weights)

    def predict(self, lr: Rasters, pan: Rasters, *, revisit: int = 0, step: float = 1.0, offset: int = 0) -> Image:
        """Fuse a scene of any size.

        Args:
            lr: Revisits [R, C, h, w].
            pan: Panchromatic image [1, H, W] of the same ground.
            revisit: Revisit that a head without encoder is given, 0-based.
            step: Reflectance of a value of 1; for float arrays of reflectance, 1.
            offset: Start of the grid of windows, LR pixels.

        Returns:
            The fused image [C, H, W], reflectance.

        Raises:
            UserError: The network cannot take these bands, revisits or sizes.
        """
        result = np.empty((self.network.config.bands, *pan.shape[-2:]), np.float32)
        first = 0
        for rows in self.stream(lr, pan, revisit=revisit, step=step, offset=offset):
            result[:, first : first + rows.shape[1]] = rows
            first += rows.shape[1]
        return result

    def stream(
        self, lr: Rasters, pan: Rasters, *, revisit: int = 0, step: float = 1.0, offset: int = 0
    ) -> Iterator[Image]:
        """Yield the fused image of a scene in bands of rows [C, n, W], from top to bottom; arguments as of `predict`.

        Memory does not depend on the number of rows, except for what ``lr`` and ``pan`` hold themselves.
        """
        self._check(lr, pan, revisit)
        height, width = pan.shape[-2:]
        lr, pan = _at_least(lr, pan, self.window)
        rows, columns = (plan_axis(lr.shape[axis], pan.shape[axis], self.window, offset) for axis in (-2, -1))
        self._check_sizes(rows[0], columns[0])
        top = 0
        for band in self._bands(lr, pan, rows, columns, revisit, step):
            band = band[:, : height - top, :width]
            if band.shape[1]:
                yield band
            top += band.shape[1]

    @torch.no_grad()
    def _bands(
        self,
        lr: Rasters,
        pan: Rasters,
        rows: Sequence[AxisWindow],
        columns: Sequence[AxisWindow],
        revisit: int,
        step: float,
    ) -> Iterator[Image]:
        """Yield the rows that no later window changes, after each row of windows."""
        device = next(self.network.parameters()).device
        across = [torch.from_numpy(column.weights).to(device) for column in columns]
        band = torch.zeros(self.network.config.bands, len(rows[0].weights), pan.shape[-1], device=device)
        for row, below in zip(rows, [*rows[1:], None], strict=True):
            down = torch.from_numpy(row.weights).to(device)[:, None]
            for first in range(0, len(columns), MICRO_BATCH):
                part = columns[first : first + MICRO_BATCH]
                fused = self._fuse(lr, pan, row, part, revisit, step) * down
                for image, column, weights in zip(fused, part, across[first:], strict=False):
                    band[:, :, column.hr_start : column.hr_stop] += image * weights
            done = (below.hr_start if below else row.hr_stop) - row.hr_start
            yield band[:, :done].cpu().numpy()
            # A new tensor: the rows above may still be in use.
            band = torch.cat([band[:, done:], torch.zeros_like(band[:, :done])], dim=1)

    def _fuse(
        self, lr: Rasters, pan: Rasters, row: AxisWindow, columns: Sequence[AxisWindow], revisit: int, step: float
    ) -> Tensor:
        """Return the network's images [B, C, H, W] of windows beside each other."""
        device = next(self.network.parameters()).device

        def windows(images: list[NDArray[Any]]) -> Tensor:
            # Sent as stored, like the training's chips.
            return torch.from_numpy(np.stack(images)).to(device).to(torch.float32) * step

        revisits = windows([lr[:, :, row.lr_start : row.lr_stop, at.lr_start : at.lr_stop] for at in columns])
        sharp = windows([pan[:, row.hr_start : row.hr_stop, at.hr_start : at.hr_stop] for at in columns])
        chosen = torch.full((len(columns),), revisit, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            fused: Tensor = self.network(revisits, sharp, chosen).fused
        return fused.float()

    def _check(self, lr: Rasters, pan: Rasters, revisit: int) -> None:
        config = self.network.config
        if len(lr.shape) != 4 or lr.shape[1] != config.bands:
            raise UserError(
                f"lr must be [R, {config.bands}, h, w] for weights of {config.bands} bands, and is {list(lr.shape)}"
            )
        if len(pan.shape) != 3 or pan.shape[0] != 1:
            raise UserError(f"pan must be [1, H, W], and is {list(pan.shape)}")
        if min(*lr.shape, *pan.shape) < 1:
            raise UserError(f"lr and pan must have pixels, and are {list(lr.shape)} and {list(pan.shape)}")
        if not 0 <= revisit < lr.shape[0]:
            raise UserError(f"revisit = {revisit} is out of range: lr has {lr.shape[0]} revisits, from 0")

    def _check_sizes(self, row: AxisWindow, column: AxisWindow) -> None:
        """Refuse windows that a stage cannot take."""
        try:
            check_sizes(self.network.config, (row.lr_size, column.lr_size), (len(row.weights), len(column.weights)))
        except ValueError as error:
            raise UserError(f"windows of this scene do not fit the weights: {error}") from None


def _at_least(lr: Rasters, pan: Rasters, size: int) -> tuple[Rasters, Rasters]:
    """Mirror a scene at its lower and right edge up to the size of a window, if it is smaller."""
    lr_more, pan_more = [], []
    for low, high in zip(lr.shape[-2:], pan.shape[-2:], strict=True):
        wanted = max(low, size)
        lr_more.append((0, wanted - low))
        pan_more.append((0, round(wanted * high / low) - high))
    if not any(after for _, after in lr_more):
        return lr, pan
    # The outer edge of a pixel is the mirror, not its centre: it is the same line on both grids.
    return (
        np.pad(lr[:], [(0, 0), (0, 0), *lr_more], mode="symmetric"),
        np.pad(pan[:], [(0, 0), *pan_more], mode="symmetric"),
    )
