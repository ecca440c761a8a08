"""What is held of a scene in memory: all of it, where training cuts any window, else its chips, cut when it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch

from pipeline.data.chips import Layout, Memory, Stored, StoredChips, Window
from sharding.format.index import JSON_SUFFIX, SampleEntry
from sharding.format.sample import images_of

Read = Callable[[memoryview], None]
"""Fills memory as long as the sample with its bytes, and has checked them."""


class Scene(Protocol):
    """One scene in memory, good while it is in use."""

    @property
    def text(self) -> bytes:
        """The sample's JSON."""
        ...

    def copy(self, window: Window, into: StoredChips, slot: int) -> None:
        """Copy the chip of a window."""
        ...


def clearest(scene: Scene) -> int:
    """Return the clearest revisit of a scene, 0-based."""
    return cast(int, json.loads(scene.text)["clearest"])


class Form(Protocol):
    """A way to hold scenes."""

    @property
    def bytes(self) -> int:
        """Memory of a scene."""
        ...

    def read(self, entry: SampleEntry, memory: Memory, read: Read) -> Scene:
        """Read a scene into memory of that size."""
        ...


@dataclass(frozen=True)
class WholeScene:
    """A sample as it is stored, of which any window can be cut."""

    images: tuple[Stored, Stored, Stored]
    """LR [R, C, h, w], HR [3, H, W] and PAN [1, H, W]."""
    text: bytes
    """The sample's JSON."""

    def copy(self, window: Window, into: StoredChips, slot: int) -> None:
        """Cut the chip out."""
        into.cut(slot, self.images, window)


@dataclass(frozen=True)
class Whole:
    """Samples as they are stored."""

    bytes: int
    """Bytes of the largest sample."""

    def read(self, entry: SampleEntry, memory: Memory, read: Read) -> WholeScene:
        """Read the sample to where it stays."""
        span = memoryview(memory)[: entry.size]  # type: ignore[arg-type]
        read(span)
        return _whole(entry, span)


@dataclass(frozen=True)
class CutScene:
    """The chips of a scene, each in one piece of memory."""

    chips: StoredChips
    """All that will be asked for."""
    numbers: Mapping[Window, int]
    """Which of them is a window's."""
    text: bytes
    """The sample's JSON."""

    def copy(self, window: Window, into: StoredChips, slot: int) -> None:
        """Copy the chip."""
        into.rows[slot] = self.chips.rows[self.numbers[window]]


class Cut:
    """Chips of the same windows of every scene.

    The sample is read into memory that serves for one after the other, so that it is checked and cut while it is in
    the processor's cache; a chip in one piece is then copied at the speed of memory.
    """

    def __init__(self, layout: Layout, windows: Sequence[Window], largest: int) -> None:
        """Prepare to cut ``windows`` out of samples of up to ``largest`` bytes."""
        self._layout, self._largest = layout, largest
        self._numbers = {window: number for number, window in enumerate(windows)}
        self._spare: list[Memory] = []

    @property
    def bytes(self) -> int:
        """Bytes of a scene's chips."""
        return len(self._numbers) * self._layout.chip_bytes

    def read(self, entry: SampleEntry, memory: Memory, read: Read) -> CutScene:
        """Read the sample beside ``memory``, and cut its chips into that."""
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = np.empty(self._largest, np.uint8)
        try:
            span = memoryview(buffer)[: entry.size]  # type: ignore[arg-type]
            read(span)
            scene = _whole(entry, span)
            chips = StoredChips(self._layout, torch.from_numpy(memory).view(len(self._numbers), -1))
            for window, number in self._numbers.items():
                chips.cut(number, scene.images, window)
            return CutScene(chips, self._numbers, scene.text)
        finally:
            self._spare.append(buffer)


def _whole(entry: SampleEntry, span: memoryview) -> WholeScene:
    images = images_of(entry, span)
    offset, length = entry.members[JSON_SUFFIX]
    return WholeScene((images["lr"], images["hr"], images["pan"]), bytes(span[offset : offset + length]))
