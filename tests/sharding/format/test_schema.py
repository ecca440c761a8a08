from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import UserError
from sharding.format.checks import key_of
from sharding.format.entries import SUFFIXES
from sharding.format.index import INDEX_NAME, Index
from sharding.format.sample import decode_sample, fetch_sample
from sharding.prepare.options import SampleOptions
from sharding.storage import CorruptedError, open_storage
from tests.sharding.conftest import Dataset


def test_the_index_survives_json(dataset: Dataset) -> None:
    assert Index.from_json(dataset.index.to_json()) == dataset.index


def test_the_digest_is_of_the_stored_bytes(dataset: Dataset) -> None:
    stored = dataset.storage.read(INDEX_NAME)
    assert Index.load(dataset.storage).digest == hashlib.sha256(stored).hexdigest()


def test_a_place_without_an_index_is_no_dataset(tmp_path: object) -> None:
    storage = open_storage(str(tmp_path))
    with pytest.raises(UserError, match=r"holds no index\.json, so it is not a dataset: run `satfusion shard"):
        Index.load(storage)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format_version": 2}', "is damaged"),
        ('{"format_version": 99}', "format version 99"),
    ],
)
def test_a_wrong_index_is_refused_with_its_place(tmp_path: object, text: str, words: str) -> None:
    storage = open_storage(str(tmp_path))
    storage.write(INDEX_NAME, text.encode())
    with pytest.raises(UserError, match=words) as caught:
        Index.load(storage)
    assert storage.uri in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        ("splits",),
        ("splits", "train"),
        ("splits", "train", 0),
        ("splits", "train", 0, "samples"),
        ("splits", "train", 0, "samples", 0),
        ("splits", "train", 0, "samples", 0, "members"),
        ("splits", "train", 0, "samples", 0, "members", "lr.npy"),
        ("preparation",),
        ("statistics",),
        ("statistics", "lr"),
        ("skipped",),
    ],
    ids=lambda path: ".".join(map(str, path)),
)
@pytest.mark.parametrize("wrong", [[1], {"a": 1}, "text", 5, None], ids=str)
def test_a_damaged_part_of_an_index_is_refused(dataset: Dataset, path: tuple[str | int, ...], wrong: object) -> None:
    data = json.loads(dataset.index.to_json())
    part = data
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = wrong
    with pytest.raises(UserError, match="is damaged"):
        Index.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("bands", [8, 4, 3], "its bands or its step are not those of its options"),
        ("step", 1.0, "its bands or its step are not those of its options"),
        ("level", "l9", "preparation: level: invalid enum value 'l9'"),
        ("more", 1, "or it has other keys"),
    ],
)
def test_an_index_of_samples_that_cannot_be_is_refused(dataset: Dataset, name: str, wrong: object, words: str) -> None:
    data = json.loads(dataset.index.to_json())
    data["preparation"][name] = wrong
    with pytest.raises(UserError, match=f"is damaged .*{words}.*: shard the dataset again"):
        Index.from_json(json.dumps(data))


def test_the_options_of_samples_survive_the_index() -> None:
    """The table is for readers without this code too: bands are numbers, and the step is told."""
    options = SampleOptions("l1c", "all", 3, "clearest", "rgbn", None, None, "float32", 12.5)
    table = json.loads(json.dumps(options.to_json()))
    assert SampleOptions.from_json(table) == options
    assert table == {
        "level": "l1c",
        "bands": list(range(1, 14)),
        "revisits": 3,
        "select": "clearest",
        "hr_source": "rgbn",
        "lr_size": None,
        "hr_size": None,
        "dtype": "float32",
        "max_cloud": 12.5,
        "step": 1.0,
    }
    assert SampleOptions().to_json()["bands"] == [4, 3, 2]
    assert SampleOptions().to_json()["step"] == 3e-5


def test_an_unknown_split_is_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="no split 'validation' in the index; it has train, val, test"):
        dataset.index.samples("validation")


def test_a_span_decodes_to_the_contract(dataset: Dataset) -> None:
    for shard, entry in dataset.index.samples("train"):
        sample = fetch_sample(dataset.storage, shard, entry)
        assert (sample.lr.shape, sample.lr.dtype) == ((8, 3, 160, 160), "uint16")
        assert (sample.clm.shape, sample.clm.dtype) == ((8, 1, 160, 160), "uint8")
        assert (sample.hr.shape, sample.hr.dtype) == ((3, 500, 500), "uint16")
        assert (sample.pan.shape, sample.pan.dtype) == ((1, 500, 500), "uint16")
        assert sample.meta["aoi"] == sample.aoi == entry.aoi
        assert set(entry.members) == set(SUFFIXES)


def test_any_changed_byte_is_noticed_and_the_aoi_named(dataset: Dataset) -> None:
    shard, entry = dataset.index.samples("val")[0]
    data = dataset.storage.read_range(shard.name, entry.offset, entry.size)
    for position in (0, 600, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(CorruptedError, match="CRC-32") as caught:
            decode_sample(entry, bytes(changed))
        assert entry.aoi in str(caught.value)
        assert entry.key in str(caught.value)
    with pytest.raises(CorruptedError, match="the index says"):
        decode_sample(entry, data[:-1])


def test_a_shard_that_is_gone_is_named(dataset: Dataset) -> None:
    shard, entry = dataset.index.samples("val")[0]
    with pytest.raises(CorruptedError, match=r"gone\.tar"):
        fetch_sample(dataset.storage, dataclasses.replace(shard, name="gone.tar"), entry)


def test_pickles_in_a_member_are_not_loaded(dataset: Dataset) -> None:
    import io
    import zlib

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    data = buffer.getvalue()
    ranges = {suffix: (0, len(data)) for suffix in SUFFIXES}
    entry = dataclasses.replace(
        dataset.index.samples("val")[0][1], size=len(data), crc32=zlib.crc32(data), members=ranges
    )
    with pytest.raises(CorruptedError, match="pickled objects"):
        decode_sample(entry, data)


@given(st.text(min_size=1))
def test_keys_are_reversible_and_fit_a_tar(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return
    key = key_of(name)
    assert unquote(key) == name
    assert key.isascii()
    assert "." not in key
    assert "/" not in key


def test_common_names_stay_readable() -> None:
    assert key_of("Amnesty POI-20-2-2") == "Amnesty POI-20-2-2"


def test_the_reading_side_needs_neither_rasterio_nor_torch() -> None:
    code = (
        "import json, sys, sharding.format.index, sharding.storage, sharding.picture, sharding.progress, sharding.cli;"
        "print(json.dumps(sorted({'rasterio', 'boto3', 'webdataset', 'torch'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
