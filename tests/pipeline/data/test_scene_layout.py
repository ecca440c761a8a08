"""Layouts of scenes in memory: chips cut when the scene is read equal those cut from a whole scene."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from pipeline.config import DataConfig
from pipeline.data import ChipDataset
from pipeline.data.chips import ChipLayout, StoredChips, Window, chip_window, make_window
from pipeline.data.scene_layout import CutScenes, SceneLayout, WholeScenes
from sharding.format.entries import SampleEntry
from sharding.storage import Fill


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_layout_is_one_stretch_a_chip(dtype: str) -> None:
    layout = ChipLayout((2, 3, 5, 5), (3, 16, 16), getattr(torch, dtype), 1)
    memory = torch.zeros(4, layout.chip_bytes, dtype=torch.uint8)
    item = np.dtype(dtype).itemsize
    assert layout.chip_bytes == (2 * 3 * 25 + 4 * 256) * item
    for number, image in enumerate(layout.tensors(memory), start=1):
        image.view(torch.uint8).fill_(number)
    found = [int((memory == number).sum()) for number in range(4)]
    assert found == [0, *(4 * item * count for count in (150, 768, 256))]
    for image, tensor in zip(StoredChips(layout, memory.numpy()).images, layout.tensors(memory), strict=True):
        np.testing.assert_array_equal(image, tensor.numpy(), strict=True)
        assert np.shares_memory(image, memory.numpy())


Taken = tuple[ChipDataset, SampleEntry, list[Window], Fill]


@pytest.fixture
def taken(shards: dict[int, str]) -> Taken:
    """Return a dataset, one of its scenes, the windows of its chips, and its reader."""
    dataset = ChipDataset(shards[3], "train", DataConfig())
    shard, entry = dataset.index.samples("train")[1]

    fill = partial(dataset.storage.read_into, shard.name, entry.offset)
    return dataset, entry, [chip_window(chip, dataset.scale) for chip in range(9)], fill


def blank(layout: ChipLayout, chips: int) -> StoredChips:
    return StoredChips(layout, np.zeros((chips, layout.chip_bytes), np.uint8))


def test_chips_cut_ahead_are_those_of_a_whole_scene(taken: Taken) -> None:
    dataset, entry, windows, fill = taken
    layouts: list[SceneLayout] = [WholeScenes(entry.size), CutScenes(dataset.layout, windows, entry.size + 100)]
    given = []
    for layout in layouts:
        scene = layout.read(entry, np.zeros(layout.scene_bytes, np.uint8), fill)
        chips = blank(dataset.layout, 9)
        for number, window in enumerate(windows):
            scene.copy(window, chips, number)
        given.append((chips.rows, scene.text))
    (whole, text), (cut, same_text) = given
    assert whole.any(axis=1).all()
    assert np.array_equal(whole, cut)
    assert text == same_text


def test_a_window_that_was_not_cut_is_not_another_one(taken: Taken) -> None:
    dataset, entry, windows, fill = taken
    layout = CutScenes(dataset.layout, windows, entry.size)
    scene = layout.read(entry, np.zeros(layout.scene_bytes, np.uint8), fill)
    with pytest.raises(KeyError):
        scene.copy(make_window(1, 2, dataset.scale), blank(dataset.layout, 1), 0)


def test_a_read_that_fails_leaves_its_buffer_to_the_next(taken: Taken) -> None:
    dataset, entry, windows, fill = taken
    layout = CutScenes(dataset.layout, windows, entry.size)
    buffers = set()

    def broken(buffer: memoryview) -> int:
        buffers.add(np.frombuffer(buffer, np.uint8).ctypes.data)
        raise OSError("cut off")

    def whole(buffer: memoryview) -> int:
        buffers.add(np.frombuffer(buffer, np.uint8).ctypes.data)
        return fill(buffer)

    memory = np.zeros(layout.scene_bytes, np.uint8)
    for _ in range(2):
        with pytest.raises(OSError, match="cut off"):
            layout.read(entry, memory, broken)
    layout.read(entry, memory, whole)
    assert len(buffers) == 1
