"""Layouts of a scene in memory: whole, if training crops any window; else its chips, cropped when it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pipeline.data.chips import ChipLayout, Memory, Stored, StoredChips, Window
from sharding.format.entries import JSON_SUFFIX, SampleEntry
from sharding.format.sample import clearest_in, clearest_of, images_of
from sharding.storage import Fill


class Scene(Protocol):
    """One scene in memory, valid while it is in use."""

    @property
    def text(self) -> bytes:
        """Return the sample's JSON."""
        ...

    def copy(self, window: Window, into: StoredChips, slot: int) -> None:
        """Copy the chip of a window."""
        ...


def clearest(scene: Scene) -> int:
    """Return the clearest revisit of a scene, 0-based."""
    return clearest_in(scene.text)


class SceneLayout(Protocol):
    """A layout of scenes in memory."""

    @property
    def scene_bytes(self) -> int:
        """Return the memory of a scene, bytes."""
        ...

    def read(self, entry: SampleEntry, memory: Memory, fill: Fill) -> Scene:
        """Read a scene into memory of that size; ``fill`` supplies the sample's bytes, checked."""
        ...


@dataclass(frozen=True)
class WholeScene:
    """A sample as stored, of which any window can be cropped."""

    images: tuple[Stored, Stored, Stored]
    """LR [R, C, h, w], HR [3, H, W] and PAN [1, H, W]."""
    text: bytes
    """The sample's JSON."""

    def copy(self, window: Window, into: StoredChips, slot: int) -> None:
        """Crop the chip."""
        into.crop(slot, self.images, window)


@dataclass(frozen=True)
class WholeScenes:
    """Layout that keeps samples as stored."""

    scene_bytes: int
    """Bytes of the largest sample."""

    def read(self, entry: SampleEntry, memory: Memory, fill: Fill) -> WholeScene:
        """Read the sample into its final memory."""
        return _read_whole(entry, memory, fill)


@dataclass(frozen=True)
class CutScene:
    """The chips of a scene, each contiguous in memory."""

    chips: StoredChips
    """All chips that can be requested."""
    numbers: Mapping[Window, int]
    """Number of each window's chip."""
    text: bytes
    """The sample's JSON."""

    def copy(self, window: Window, into: StoredChips, slot: int) -> None:
        """Copy the chip."""
        into.rows[slot] = self.chips.rows[self.numbers[window]]


class CutScenes:
    """Layout that keeps the chips of the same windows of every scene.

    Samples are read one after the other into one buffer, so that each is checked and cropped while it is in the
    processor's cache; a contiguous chip is then copied at the speed of memory.
    """

    def __init__(self, layout: ChipLayout, windows: Sequence[Window], largest: int) -> None:
        """Prepare to crop ``windows`` out of samples of up to ``largest`` bytes."""
        self._layout, self._largest = layout, largest
        self._numbers = {window: number for number, window in enumerate(windows)}
        self._free_buffers: list[Memory] = []

    @property
    def scene_bytes(self) -> int:
        """Return the bytes of a scene's chips."""
        return len(self._numbers) * self._layout.chip_bytes

    def read(self, entry: SampleEntry, memory: Memory, fill: Fill) -> CutScene:
        """Read the sample into a buffer, and crop its chips into ``memory``."""
        try:
            buffer = self._free_buffers.pop()
        except IndexError:
            buffer = np.empty(self._largest, np.uint8)
        try:
            scene = _read_whole(entry, buffer, fill)
            chips = StoredChips(self._layout, torch.from_numpy(memory).view(len(self._numbers), -1))
            for window, number in self._numbers.items():
                chips.crop(number, scene.images, window)
            return CutScene(chips, self._numbers, scene.text)
        finally:
            self._free_buffers.append(buffer)


def _read_whole(entry: SampleEntry, memory: Memory, fill: Fill) -> WholeScene:
    sample = memoryview(memory)[: entry.size]  # type: ignore[arg-type]
    fill(sample)
    images = images_of(entry, sample)
    clearest_of(entry, sample)  # so that a JSON that lacks it is damage of this sample
    offset, length = entry.members[JSON_SUFFIX]
    return WholeScene((images["lr"], images["hr"], images["pan"]), bytes(sample[offset : offset + length]))
