from __future__ import annotations

import hashlib
import io
import json
from urllib.parse import unquote

import numpy as np
import pytest
import webdataset

from sharding.format.checks import key_of
from sharding.format.sample import decode_sample
from sharding.format.writer import NewSample, ShardWriter


def sample(aoi: str, seed: int, dtype: str = "uint16") -> NewSample:
    rng = np.random.default_rng(seed)

    def image(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        return (rng.random(shape) * 60000).astype(dtype)

    images = {
        "lr": image(2, 3, 5, 6).transpose(0, 1, 3, 2),  # not contiguous
        "clm": rng.integers(0, 2, (2, 1, 5, 6)).astype(np.uint8),
        "hr": image(3, 16, 17),
        "pan": image(1, 16, 16),  # 512 bytes of uint16: no padding
    }
    meta = {"aoi": aoi, "number": seed, "clearest": 0, "revisits": [{"date": None}] * 2, "step": 3e-5}
    return NewSample(aoi, images, {**meta, "crs": "EPSG:32633", "pan_transform": [1.5, 0, 5e5, 0, -1.5, 4e6]})


SAMPLES = [sample("Amnesty POI-20-2-2", 1), sample("a" * 95, 2), sample("dots.and/slashes é", 3, "float32")]


def by_the_library(samples: list[NewSample]) -> bytes:
    file = io.BytesIO()
    with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for item in samples:
            members = {}
            for name, image in item.images.items():
                buffer = io.BytesIO()
                np.save(buffer, np.ascontiguousarray(image))
                members[f"{name}.npy"] = buffer.getvalue()
            members["json"] = json.dumps(item.meta, sort_keys=True).encode()
            tar.write({"__key__": key_of(item.aoi), **members})
    return file.getvalue()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_bytes_are_those_of_webdatasets_writer(count: int) -> None:
    file = io.BytesIO()
    writer = ShardWriter(file)
    for item in SAMPLES[:count]:
        writer.add(item)
    entry = writer.finish("train-00000.tar")
    data = file.getvalue()
    assert data == by_the_library(SAMPLES[:count])
    assert (entry.name, entry.bytes, entry.sha256) == ("train-00000.tar", len(data), hashlib.sha256(data).hexdigest())
    assert writer.size == len(data)


def test_the_index_line_leads_to_each_member() -> None:
    file = io.BytesIO()
    writer = ShardWriter(file)
    for item in SAMPLES:
        writer.add(item)
    entry = writer.finish("x.tar")
    for item, place in zip(SAMPLES, entry.samples, strict=True):
        assert unquote(place.key) == place.aoi == item.aoi
        read = decode_sample(place, file.getvalue()[place.offset : place.offset + place.size])
        assert read.meta == item.meta
        for name, image in item.images.items():
            assert getattr(read, name).dtype == image.dtype
            assert np.array_equal(getattr(read, name), image)
