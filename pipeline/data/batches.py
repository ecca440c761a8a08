"""Batches: chips as stored, in reused memory, and chips as the network is given them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.chips import ChipLayout, StoredChips, Variant, turn_and_flip
from pipeline.data.scene_layout import Scene
from pipeline.data.simulate import SIMULATORS, chip_generator
from pipeline.quality.masks import has_data

BLANK = 0.3
"""Reflectance of quarantined chips: any finite image works, since their weight is 0."""


@dataclass(frozen=True)
class Batch:
    """Batch of one rank, ready for the network; images are float32 reflectances."""

    lr: Tensor
    """[B, R, C, h, w] low-resolution revisits."""
    pan: Tensor
    """[B, 1, H, W] panchromatic image."""
    hr: Tensor
    """[B, C, H, W] target."""
    revisit: Tensor
    """[B] int64, the revisit that a head without encoder is given."""
    weight: Tensor
    """[B] float32: 1, or 0 for a quarantined chip or one without enough data, which must not count."""
    chips: tuple[int, ...]
    """Chip numbers, chips of a scene * sample + window."""
    valid: Tensor | None = None
    """[B, 1, H, W] float32, 1 where target and PAN hold data, else 0; None if the dataset does not store it."""

    @property
    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the order of the fields."""
        tensors = [self.lr, self.pan, self.hr, self.revisit, self.weight]
        return tensors if self.valid is None else [*tensors, self.valid]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return self._with([tensor.to(device, non_blocking=True) for tensor in self.tensors], self.chips)

    def split(self, size: int) -> list[Batch]:
        """Return consecutive micro-batches of ``size`` chips."""
        return [
            self._with([tensor[first : first + size] for tensor in self.tensors], self.chips[first : first + size])
            for first in range(0, len(self.chips), size)
        ]

    @staticmethod
    def _with(tensors: Sequence[Tensor], chips: tuple[int, ...]) -> Batch:
        lr, pan, hr, revisit, weight, *valid = tensors
        return Batch(lr, pan, hr, revisit, weight, chips, *valid)


def collate(batches: Sequence[Batch]) -> Batch:
    """Join batches along the first axis."""
    columns = [torch.cat(column) for column in zip(*(batch.tensors for batch in batches), strict=True)]
    return Batch._with(columns, tuple(chip for batch in batches for chip in batch.chips))


class StoredBatch:
    """Memory for the stored chips of one batch; page-locked if a GPU copies from it."""

    def __init__(self, layout: ChipLayout, size: int, *, pin: bool = False) -> None:
        """Allocate memory for ``size`` chips."""
        self.layout = layout
        shape = (size, layout.chip_bytes)
        # numpy asks for huge pages, torch does not.
        self.memory = (
            torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            if pin
            else torch.from_numpy(np.empty(shape, np.uint8))
        )
        """[B, chip_bytes], each chip as bytes."""
        self.lr, self.hr, self.pan, *_ = layout.tensors(self.memory)
        """[B, R, C, h, w], [B, C, H, W] and [B, 1, H, W], views of it."""
        self.weight = torch.ones(size, pin_memory=pin)
        """[B], 1, or 0 for a quarantined chip."""
        self.chips: tuple[int, ...] = ()
        self.variants: tuple[Variant, ...] = ()
        self._stored = StoredChips(layout, self.memory.numpy())

    def begin(self, chips: Sequence[int], variants: Sequence[Variant]) -> None:
        """Set the chips that `put` will copy."""
        self.chips, self.variants = tuple(chips), tuple(variants)
        self.weight.fill_(1)

    def put(self, slot: int, scene: Scene | None) -> None:
        """Copy the chip of ``slot`` out of its scene; None leaves the slot blank, with weight 0."""
        if scene is not None:
            scene.copy(self.variants[slot].window, self._stored, slot)
            return
        for images in self._stored.images:  # also the mask, where it counts as data
            images[slot] = (BLANK - self.layout.offset) / self.layout.unit
        self.weight[slot] = 0


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on ``device``; the host does not wait for a copy to a GPU."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def to_batch(stored: StoredBatch, device: torch.device, simulate: str, draw: tuple[int, int]) -> Batch:
    """Return a batch as the network is given it, in new memory on ``device``.

    Chips are turned, flipped and simulated on the device. On CUDA the copies are asynchronous.

    Args:
        stored: The chips.
        device: Device of the network.
        simulate: ``off``, or the mode of simulating revisits from the target (`pipeline.data.simulate`).
        draw: Seed and epoch of the simulation.
    """
    *images, mask = stored.layout.tensors(stored.memory.to(device, non_blocking=True))
    valid = (mask != 0).to(torch.float32) if stored.layout.valid else None
    if valid is None:
        images.append(mask)
    lr, hr, pan = (image.to(torch.float32) * stored.layout.unit for image in images)
    if stored.layout.offset:
        lr, hr, pan = (image + stored.layout.offset for image in (lr, hr, pan))
    groups: dict[tuple[int, bool], list[int]] = {}
    for slot, variant in enumerate(stored.variants):
        groups.setdefault((variant.quarter_turns, variant.flip), []).append(slot)
    for (turns, flip), slots in groups.items():
        if turns or flip:
            chosen = send(torch.tensor(slots), device)
            for image in (lr, hr, pan, *([] if valid is None else [valid])):
                image[chosen] = turn_and_flip(image[chosen], turns, flip)
    if simulator := SIMULATORS.get(simulate):
        stored_revisits, *_, rows, columns = stored.layout.lr
        made = [
            simulator(target, stored.layout.revisits or stored_revisits, (rows, columns), chip_generator(*draw, chip))
            for target, chip in zip(hr, stored.chips, strict=True)
        ]
        lr = torch.stack(made)
    weight = stored.weight.to(device, copy=True, non_blocking=True)
    return Batch(
        lr=lr,
        pan=pan,
        hr=hr,
        revisit=send(torch.tensor([variant.revisit for variant in stored.variants]), device),
        weight=weight if valid is None else weight * has_data(valid),
        chips=stored.chips,
        valid=valid,
    )
