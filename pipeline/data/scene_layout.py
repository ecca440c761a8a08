"""Layouts of a scene in memory: whole, if training crops any window; else its chips, cropped when it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.clouds import Cloudy, choose, clear_shares
from pipeline.data.chips import ChipLayout, Memory, Stored, StoredChips, Window
from sharding.format.entries import JSON_SUFFIX, SampleEntry
from sharding.format.layout import VALID
from sharding.format.sample import clearest_in, clearest_of, images_of
from sharding.storage import Fill


class Scene(Protocol):
    """One scene in memory, valid while it is in use."""

    @property
    def text(self) -> bytes:
        """Return the sample's JSON."""
        ...

    def revisits(self, window: Window) -> Sequence[int] | None:
        """Return the stored revisits that the chip of a window consists of; None for all, each once."""
        ...

    def copy(self, window: Window, into: StoredChips, slot: int) -> None:
        """Copy the chip of a window."""
        ...


def clearest(scene: Scene, window: Window) -> int:
    """Return the place of the scene's clearest revisit in the chip of a window, 0-based; 0 if the chip lacks it."""
    number, revisits = clearest_in(scene.text), scene.revisits(window)
    if revisits is None:
        return number
    return revisits.index(number) if number in revisits else 0


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

    images: tuple[Stored, ...]
    """LR [R, C, h, w], HR [3, H, W], PAN [1, H, W] and, if it is stored, the mask of pixels with data [1, H, W]."""
    clm: npt.NDArray[np.uint8]
    """Cloud masks [R, 1, h, w]."""
    text: bytes
    """The sample's JSON."""
    cloudy: Cloudy = "keep"
    """Rule for cloudy revisits."""

    def revisits(self, window: Window) -> tuple[int, ...] | None:
        """Choose the revisits by their clouds in the window."""
        if self.cloudy == "keep":
            return None
        rows, columns = (slice(start, start + window.size) for start in (window.y, window.x))
        return choose(clear_shares(self.images[0][..., rows, columns], self.clm[..., rows, columns]), self.cloudy)

    def copy(self, window: Window, into: StoredChips, slot: int) -> None:
        """Crop the chip."""
        into.crop(slot, self.images, window, self.revisits(window))


@dataclass(frozen=True)
class WholeScenes:
    """Layout that keeps samples as stored."""

    scene_bytes: int
    """Bytes of the largest sample."""
    cloudy: Cloudy = "keep"
    """Rule for cloudy revisits."""

    def read(self, entry: SampleEntry, memory: Memory, fill: Fill) -> WholeScene:
        """Read the sample into its final memory."""
        return _read_whole(entry, memory, fill, self.cloudy)


@dataclass(frozen=True)
class CutScene:
    """The chips of a scene, each contiguous in memory."""

    chips: StoredChips
    """All chips that can be requested."""
    numbers: Mapping[Window, int]
    """Number of each window's chip."""
    text: bytes
    """The sample's JSON."""
    chosen: Mapping[Window, tuple[int, ...] | None]
    """Revisits of each window's chip."""

    def revisits(self, window: Window) -> tuple[int, ...] | None:
        """Return the revisits that were chosen when the scene was read."""
        return self.chosen[window]

    def copy(self, window: Window, into: StoredChips, slot: int) -> None:
        """Copy the chip."""
        into.rows[slot] = self.chips.rows[self.numbers[window]]


class CutScenes:
    """Layout that keeps the chips of the same windows of every scene.

    Samples are read one after the other into one buffer, so that each is checked and cropped while it is in the
    processor's cache; a contiguous chip is then copied at the speed of memory.
    """

    def __init__(self, layout: ChipLayout, windows: Sequence[Window], largest: int, cloudy: Cloudy = "keep") -> None:
        """Prepare to crop ``windows`` out of samples of up to ``largest`` bytes, by a rule for cloudy revisits."""
        self._layout, self._largest, self._cloudy = layout, largest, cloudy
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
            scene = _read_whole(entry, buffer, fill, self._cloudy)
            chips = StoredChips(self._layout, memory.reshape(len(self._numbers), -1))
            chosen = {window: scene.revisits(window) for window in self._numbers}
            for window, number in self._numbers.items():
                chips.crop(number, scene.images, window, chosen[window])
            return CutScene(chips, self._numbers, scene.text, chosen)
        finally:
            self._free_buffers.append(buffer)


def _read_whole(entry: SampleEntry, memory: Memory, fill: Fill, cloudy: Cloudy) -> WholeScene:
    sample = memoryview(memory)[: entry.size]  # type: ignore[arg-type]
    fill(sample)
    images = images_of(entry, sample)
    clearest_of(entry, sample)  # so that a JSON that lacks it is damage of this sample
    offset, length = entry.members[JSON_SUFFIX]
    shown = tuple(images[name] for name in ("lr", "hr", "pan", VALID) if name in images)
    return WholeScene(shown, images["clm"], bytes(sample[offset : offset + length]), cloudy)
